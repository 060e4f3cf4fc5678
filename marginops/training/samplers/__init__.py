"""Samplers: which samples the next epoch visits, and in which order."""
