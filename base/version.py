"""The version of this package, for whatever is written into a file. Ignored: versions of files, which their modules know."""

__version__ = "0.1.0"
