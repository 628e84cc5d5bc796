"""Errors that a caller of this package can meet beside `ValueError`."""


class ModelLoadError(Exception):
    """A model or pair cannot be served. The message is one line: what is wrong and the cure."""
