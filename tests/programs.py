"""Programs that tests start and pip cannot install; `scripts/install --system` brings them."""

import os
import shutil

import pytest


def program(name: str) -> str:
    """Path of the program; without it the calling test is skipped, or fails where CI=true."""
    path = shutil.which(name)
    if path is None:
        message = f"{name} is missing: scripts/install --system"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return path
