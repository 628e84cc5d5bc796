"""The engine of a faulty worker: its steps are held, counted and spoilt on order."""

import collections
import json
import math
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import torch

import decoding
from decoding import SequenceOutput
from decoding.engine import Engine
from decoding.model import CausalModel
from server import worker
from tests.chaos.worker import Faults


class Gate:
    """Where steps wait while a test holds them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._permits: int | None = None
        self._held = False
        self.num_steps = 0

    def wait(self) -> None:
        with self._changed:
            self._held = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._permits is None or self._permits > 0)
            self._held = False
            if self._permits is not None:
                self._permits -= 1

    def count(self) -> None:
        with self._changed:
            self.num_steps += 1
            self._changed.notify_all()

    def set(self, permits: int | None) -> None:
        with self._changed:
            self._permits = permits
            self._changed.notify_all()

    def wait_held(self) -> bool:
        """Until the engine stands at the gate; False if it does not come."""
        with self._changed:
            return self._changed.wait_for(lambda: self._held, timeout=10)

    def step(self) -> None:
        """Let one step pass and wait for its end."""
        with self._changed:
            before = self.num_steps
            self._permits = 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.num_steps > before)


class FaultyEngine(Engine):
    """The engine behind the gate, with the faults that were ordered."""

    gate: Gate
    faults: Faults
    current: "FaultyEngine | None" = None
    leaked: ClassVar[list[bytes]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        type(self).current = self
        for role, model in self.pair.models.items():
            self._spoil(role, model)

    def step(self) -> list[SequenceOutput]:
        self.gate.wait()
        orders = self.faults.read()
        if orders.get("die") or self._holds(orders.get("die_at")):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._holds(orders.get("hang_at")):
            time.sleep(3600)
        if orders.get("leak"):
            self.leaked.append(b"x" * 2**20)
        try:
            return super().step()
        finally:
            self.gate.count()

    def status(self) -> dict[str, Any]:
        """To be asked while steps are held or when nothing runs any more."""
        assert not self.has_work() or self.gate.wait_held()
        self.check_integrity()
        return {
            "steps": self.gate.num_steps,
            "running": self.num_running,
            "waiting": self.num_waiting,
            "free_rows": self.num_free_rows,
            "has_work": self.has_work(),
        }

    def _holds(self, token_id: int | None, rows: slice | None = None) -> bool:
        everywhere = (*self._rows.sequences, *self._queue)
        sequences = everywhere if rows is None else self._rows.sequences[rows]
        return token_id is not None and any(token_id in each.prompt_ids for each in sequences)

    def _spoil(self, role: str, model: CausalModel) -> None:
        forward = model.forward

        def spoiled(rows: slice, *args: Any, **options: Any) -> Any:
            orders = self.faults.read()
            if role == "draft" and orders.get("draft"):
                raise RuntimeError("the draft is broken")
            full = rows.stop - rows.start > orders.get("most_rows", math.inf)
            if role == "target" and (full or self._holds(orders.get("no_memory_at"), rows)):
                raise torch.OutOfMemoryError("no memory is left")
            logits = forward(rows, *args, **options)
            token_id = orders.get("nan_at")
            for row, sequence in enumerate(self._rows.sequences[rows]):
                if role == "target" and token_id in sequence.prompt_ids:
                    logits[row] = float("nan")
            return logits

        model.forward = spoiled  # type: ignore[method-assign]


class Received:
    """Counts the frames that the worker's reader has taken, by type."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self._receive = worker.receive_command

    def __call__(self, link: socket.socket) -> Any:
        command = self._receive(link)
        self.counts[type(command).__name__] += 1
        return command


def answer(order: str, gate: Gate, received: Received) -> dict[str, Any]:
    if order == "hold":
        gate.set(0)
    elif order == "open":
        gate.set(None)
    elif order == "step":
        gate.step()
    engine = FaultyEngine.current
    status = engine.status() if order == "status" and engine else {}
    return {"received": received.counts, "steps": gate.num_steps, **status}


def serve_control(listener: socket.socket, gate: Gate, received: Received) -> None:
    """One test at a time."""
    while True:
        connection, _ = listener.accept()
        with connection, connection.makefile("rw") as lines:
            for line in lines:
                try:
                    reply = answer(json.loads(line), gate, received)
                except AssertionError as error:
                    reply = {"broken": repr(error)}
                lines.write(json.dumps(reply) + "\n")
                lines.flush()


def install(folder: Path, faults: Faults) -> None:
    """Make this process's worker a faulty one, and listen to the test."""
    FaultyEngine.gate, FaultyEngine.faults = Gate(), faults
    decoding.Engine = FaultyEngine  # type: ignore[misc]
    worker.receive_command = received = Received()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / f"{os.getpid()}.sock"))
    listener.listen()
    arguments = listener, FaultyEngine.gate, received
    threading.Thread(target=serve_control, args=arguments, daemon=True).start()
