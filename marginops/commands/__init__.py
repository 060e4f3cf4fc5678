"""The command line: it uses every room, and no room uses it."""
