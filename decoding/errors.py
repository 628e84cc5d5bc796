"""Errors that a caller of this package can meet beside `ValueError`."""


class ModelLoadError(Exception):
    """A model or pair cannot be served. The message is one line: what is wrong and the cure."""


class RankError(RuntimeError):
    """An operation of a split target broke off: its ranks are no longer at the same place, and cannot be."""


def one_line(error: BaseException, most: int) -> str:
    """What `error` says, its lines joined, in at most so many characters."""
    return " ".join(str(error).split())[:most]
