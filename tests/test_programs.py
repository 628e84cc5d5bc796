"""A test without its program: skipped, but a failure in CI."""

import pytest

from tests.programs import program


def test_a_program_that_is_there() -> None:
    assert program("bash").endswith("/bash")


def test_a_missing_program_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="scripts/install --system"):
        program("no-such-program")


def test_a_missing_program_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="scripts/install --system"):
        program("no-such-program")
