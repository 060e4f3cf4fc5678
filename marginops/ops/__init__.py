"""The ops, one module per family."""
