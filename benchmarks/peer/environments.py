"""Environments of their own for programs that must not mix with this project's packages."""

import os
import subprocess
import venv
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmtad-external"


def environment(name: str, *requirements: str, unwanted: tuple[str, ...] = ()) -> Path:
    """The programs of a virtual environment with `requirements`, made once and kept in the user's cache.

    Each requirement is installed by a step of its own, in this order; packages in `unwanted` are taken out
    again. Raises ValueError with the end of pip's words when a package cannot be installed.
    """
    folder = CACHE / name
    programs, installed = folder / "bin", folder / "installed.txt"
    wanted = "\n".join([*requirements, *(f"without {each}" for each in unwanted)])
    if not installed.exists() or installed.read_text(encoding="utf-8") != wanted:
        venv.create(folder, with_pip=True, clear=True)
        for requirement in requirements:
            _pip(programs / "python", "install", requirement)
        if unwanted:
            _pip(programs / "python", "uninstall", "--yes", *unwanted)
        installed.write_text(wanted, encoding="utf-8")
    return programs


def version(python: Path, package: str) -> str:
    """Of `package` in the environment of `python`."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    asked = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    return asked.stdout.strip()


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", arguments[0], "--quiet", *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed packages
    if done.returncode:
        end = " ".join(done.stderr.strip().splitlines()[-2:])
        raise ValueError(f"pip {arguments[0]} {' '.join(arguments[1:])} failed: {end}")
