"""One process that serves HTTP, one child process per device that decodes."""

__version__ = "0.1.0"
