"""What a training run saw of every sample, and what follows from it."""
