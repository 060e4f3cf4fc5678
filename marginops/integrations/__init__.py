"""Adapters to trainers. Import the file of your trainer, which has to be installed."""
