"""Selects the samples of a batch that are worth a backward pass."""
