"""`scripts/install --system` with a PATH of the test's own: what is missing, and who may install it."""

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

INSTALL = Path(__file__).parent.parent.parent / "scripts/install"


def install(folder: Path, present: Iterable[str], *, user: int) -> tuple[int, str, str]:
    """Exit code, standard error, and what apt-get was called with, a line per call."""
    for name in ("bash", "dirname"):
        (folder / name).symlink_to(shutil.which(name) or "")
    calls = folder / "calls"
    calls.touch()
    programs = {"id": f"echo {user}", "apt-get": f'echo "$@" >> {calls}', **dict.fromkeys(present, "exit 0")}
    for name, body in programs.items():
        (folder / name).write_text(f"#!{folder}/bash\n{body}\n")
        (folder / name).chmod(0o755)
    result = subprocess.run(
        [INSTALL, "--system"], env={"PATH": str(folder)}, capture_output=True, text=True, check=False
    )
    return result.returncode, result.stderr, calls.read_text()


@pytest.mark.parametrize("user", [0, 1000])
def test_nothing_is_missing(tmp_path: Path, user: int) -> None:
    present = ("prometheus", "promtool", "chromium", "openssl")
    assert install(tmp_path, present, user=user) == (0, "", "")


@pytest.mark.parametrize("program", ["prometheus", "promtool"])
def test_only_what_is_missing_is_installed(tmp_path: Path, program: str) -> None:
    present = {"prometheus", "promtool", "chromium", "openssl"} - {program}
    code, _, calls = install(tmp_path, present, user=0)
    assert code == 0
    update, packages = calls.splitlines()
    assert update.startswith("update")
    assert packages.split() == ["install", "--yes", "--no-install-recommends", "prometheus", "-qq"]


def test_without_root_it_says_what_to_run(tmp_path: Path) -> None:
    code, error, calls = install(tmp_path, ["openssl"], user=1000)
    assert (code, calls) == (1, "")
    assert "missing programs: prometheus chromium." in error
    assert "apt-get install --yes --no-install-recommends prometheus chromium" in error
    assert error.count("\n") == 1


def test_another_argument_is_refused(tmp_path: Path) -> None:
    result = subprocess.run([INSTALL, "--sistem"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (
        2,
        "usage: scripts/install [--dev | --energy | --ray | --system]\n",
    )
