"""The server with workers that fail on order: `python -m tests.chaos.server FOLDER [flags]`."""

import functools
import sys
from pathlib import Path

from tests.chaos import audit


def main() -> int:
    folder = sys.argv.pop(1)
    audit.start(Path(folder))
    from server import __main__ as entry  # watched from its first line on
    from server.supervisor import WorkerProcess

    command_line = (sys.executable, "-m", "tests.chaos.worker", folder)
    return entry.main(functools.partial(WorkerProcess, command_line=command_line))


if __name__ == "__main__":
    raise SystemExit(main())
