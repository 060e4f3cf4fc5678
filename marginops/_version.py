"""The version. Packaging, the cache and the native libraries read it here."""

__version__ = "0.1.0"
