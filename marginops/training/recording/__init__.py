"""What a training run leaves behind for its report: a folder with every epoch and every sample."""
