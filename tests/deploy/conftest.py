"""The fixtures of tests/e2e: a tiny pair, and real servers that serve it."""

from tests.e2e.conftest import pair, start

__all__ = ["pair", "start"]
