"""How many GPUs workers can use, found without loading PyTorch or the driver into the API process."""

import ctypes
import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path

import structlog

CHILD_SECONDS = 60.0

log = structlog.get_logger("server")


def count_gpus() -> int:
    """CUDA devices that a worker would see; 0 for a PyTorch without CUDA and where there is no driver."""
    if not _torch_uses_cuda():
        return 0
    command_line = [sys.executable, "-m", "server.gpus"]
    try:
        child = subprocess.run(command_line, capture_output=True, timeout=CHILD_SECONDS, check=True)  # noqa: S603 - ours
        return int(child.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        log.warning("gpus_not_counted", reason=str(error))
        return 0


def _torch_uses_cuda() -> bool:
    """What the installed PyTorch was built for, out of the file that says so."""
    package = importlib.util.find_spec("torch")
    if package is None or package.origin is None:
        return False
    version = Path(package.origin).with_name("version.py")
    return version.is_file() and runpy.run_path(str(version)).get("cuda") is not None


def visible_gpus() -> int:
    """What the driver says; it heeds `CUDA_VISIBLE_DEVICES`."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


if __name__ == "__main__":
    sys.stdout.write(str(visible_gpus()))
