"""The server with workers that fail on order: `python -m tests.chaos.server FOLDER [flags]`."""

import functools
import sys

from server import __main__ as entry
from server.supervisor import WorkerProcess


def main() -> int:
    folder = sys.argv.pop(1)
    command_line = (sys.executable, "-m", "tests.chaos.worker", folder)
    return entry.main(functools.partial(WorkerProcess, command_line=command_line))


if __name__ == "__main__":
    raise SystemExit(main())
