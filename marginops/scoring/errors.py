"""Errors of data and of output folders."""


class DataError(ValueError):
    """The data, the head or the folder of a run is at fault. The message names the file."""


class OutputError(OSError):
    """The folder of a run cannot be written. What was finished before stays."""
