"""Adapters to trainers, one file each. A file imports its trainer, so import the one you need."""
