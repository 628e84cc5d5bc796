"""The one error a caller is told."""


class DistillError(Exception):
    """A draft cannot be made. The message is one line: what is wrong and the cure."""
