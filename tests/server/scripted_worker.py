"""A worker process without models, started by tests in place of `python -m server.worker`.

The target's name says how it behaves: `fatal`, `crash` (while loading), `silent` (never ready),
`bad-frame` (after it was ready), `chatty` (output that is no frame), `unloads` (takes its time to
end); any other name serves.
"""

import signal
import sys
import time

from decoding import ModelLoadError
from server import worker
from server.link import Outbox
from server.messages import LoadCommand, LoadingEvent
from tests.server.fakes import ScriptedEngine, ready_event

UNLOAD_SECONDS = 1.0
slow_to_end: list[bool] = []


def load(command: LoadCommand, outbox: Outbox) -> worker.Loaded:
    outbox.put(LoadingEvent(stage="models"))
    outbox.flush(wait=True)
    name = command.target or ""
    if name == "fatal":
        raise ModelLoadError("no such model\nat all")
    if name == "crash":
        raise RuntimeError("secret")
    if name == "unloads":
        slow_to_end.append(True)
    if name == "silent":
        time.sleep(600)
    outbox.put(ready_event(command.draft or ""))
    outbox.flush(wait=True)
    if name == "bad-frame":
        outbox._link.sendall(b"\xff" * 64)
    return worker.Loaded(ScriptedEngine())


def main() -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    import socket

    status = worker.worker_main(socket.socket(fileno=int(sys.argv[2])), load)
    if slow_to_end:
        time.sleep(UNLOAD_SECONDS)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
