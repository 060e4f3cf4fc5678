"""The command line ``marginops``. No other part of the package imports it."""
