"""A real worker with faults: `python -m tests.chaos.worker FOLDER --link-fd N`.

Tests hold and count its steps over the socket `FOLDER/<pid>.sock`, one JSON object per line each way, and
order faults by `FOLDER/faults.json`, which is read before each step:

    load        "die" or "sleep": what happens instead of loading
    die         the process is killed in the next step
    die_at      ... in the first step with a sequence that holds this token
    hang_at     a step with a sequence that holds this token never returns
    nan_at      the target gives no numbers to sequences that hold this token
    draft       the draft raises
    most_rows   a pass of the target over more rows than these finds no memory
    no_memory_at    ... nor does one with a sequence that holds this token
    leak        each step keeps a MiB for ever
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from tests.chaos import audit

FAULTS = "faults.json"


class Faults:
    def __init__(self, folder: Path) -> None:
        self._file = folder / FAULTS
        self._stamp = 0
        self._orders: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        stamp = self._file.stat().st_mtime_ns if self._file.exists() else 0
        if stamp != self._stamp:
            self._stamp = stamp
            self._orders = json.loads(self._file.read_text()) if stamp else {}
        return self._orders


def main() -> NoReturn:
    folder = Path(sys.argv.pop(1))
    audit.start(folder)
    faults = Faults(folder)
    order = faults.read().get("load")
    if order == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if order == "sleep":
        time.sleep(3600)
    from tests.chaos import faulty_engine  # torch takes seconds, which these faults need not wait for

    faulty_engine.install(folder, faults)
    faulty_engine.worker.main()


if __name__ == "__main__":
    main()
