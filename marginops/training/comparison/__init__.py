"""Compares samplings by the cost of equal accuracy."""
