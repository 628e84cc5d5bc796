"""`python -m server.worker`: loads the pair, then decodes what the frames of its link ask for.

Only a stop frame, the end of the link or SIGKILL ends it. Every command is answered: with its
tokens and a FinishedEvent, or with a FailedEvent. Its protocol is in `server.messages`.
"""

import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import structlog

import decoding
from decoding import ModelLoadError
from server.config import worker_link_fd
from server.energy import EnergyMeter
from server.energy_source import EnergySource, EnergySourceError, open_source
from server.link import Outbox, receive_command
from server.logs import configure_logging
from server.loop import EngineLike, Tick, WorkerLoop
from server.messages import (
    BadFrameError,
    Command,
    FatalEvent,
    LoadCommand,
    LoadingEvent,
    ReadyEvent,
    StopCommand,
)

if TYPE_CHECKING:
    from decoding import ModelPair, Policy

EXIT_BAD_MODEL = 2
EXIT_BROKEN = 1
NICENESS = 5
TICK_SECONDS = 1.0

log = structlog.get_logger("server.worker")


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a worker works with."""

    engine: EngineLike
    energy_source: EnergySource | None = None


def read_commands(link: socket.socket, inbox: "queue.SimpleQueue[Command | Tick]") -> None:
    """Body of the reader thread: ends the process with its link, however stuck a step may be."""
    try:
        while (command := receive_command(link)) is not None:
            inbox.put(command)
    except BadFrameError as error:
        log.error("bad_frame", reason=str(error))
    os._exit(EXIT_BROKEN)


def load_pair(command: LoadCommand) -> "ModelPair":
    """Raises ModelLoadError."""
    target, draft = command.target, command.draft
    if target is None:
        target, draft = decoding.prepare_embedded_pair()
    return decoding.load_model_pair(
        target,
        draft,
        device=command.device,
        dtype=command.dtype,
        max_model_len=command.max_model_len,
        max_num_seqs=command.max_num_seqs,
        tensor_parallel_size=command.tensor_parallel_size,
    )


def describe(pair: "ModelPair", load_seconds: float, source: EnergySource | None) -> ReadyEvent:
    return ReadyEvent(
        vocab_size=pair.vocab_size,
        max_model_len=pair.max_model_len,
        eos_token_ids=list(pair.eos_token_ids),
        bos_token_id=pair.bos_token_id,
        tokenizer_file=str(pair.tokenizer_file),
        has_draft=pair.has_draft,
        description=pair.description,
        device=str(pair.device),
        memory_bytes=pair.memory_bytes,
        load_seconds=load_seconds,
        role_load_seconds=pair.load_seconds,
        chat_template=pair.chat.template,
        special_tokens=dict(pair.chat.special_tokens),
        energy_source=None if source is None else source.name,
    )


def load_engine(command: LoadCommand, outbox: Outbox) -> Loaded:
    """Load the pair and announce it; raises ModelLoadError."""
    started = time.monotonic()
    outbox.put(LoadingEvent(stage="models"))
    outbox.flush(wait=True)
    pair = load_pair(command)
    record_graphs(command, pair, outbox)
    engine: EngineLike = decoding.Engine(
        pair,
        max_num_seqs=command.max_num_seqs,
        prefix_caching=command.enable_prefix_caching,
        policy=make_policy(command, pair, outbox),
    )
    source = open_energy(command, str(pair.device))
    outbox.put(describe(pair, time.monotonic() - started, source))
    outbox.flush(wait=True)
    return Loaded(engine, source)


def record_graphs(command: LoadCommand, pair: "ModelPair", outbox: Outbox) -> None:
    """On a GPU, passes are replayed from graphs unless that was refused."""
    if command.enforce_eager or pair.device.type == "cpu":
        return
    outbox.put(LoadingEvent(stage="graphs"))
    outbox.flush(wait=True)
    started = time.monotonic()
    graphs = decoding.record_graphs(pair, command.decoding)
    log.info("graphs_recorded", graphs=graphs, seconds=round(time.monotonic() - started, 1))


def make_policy(command: LoadCommand, pair: "ModelPair", outbox: Outbox) -> "Policy | None":
    """What chooses the shapes of steps, once it is known what they cost here."""
    largest = command.decoding
    if not largest.adaptive or not pair.has_draft:
        return None
    outbox.put(LoadingEvent(stage="costs"))
    outbox.flush(wait=True)
    depth, width = largest.num_speculative_tokens, largest.beam_width
    return decoding.Policy(decoding.load_costs(pair, command.max_num_seqs, depth=depth, width=width))


def open_energy(command: LoadCommand, device: str) -> EnergySource | None:
    """The energy source that was asked for; raises ModelLoadError.

    A CPU's counter is one for the whole host: none of several workers could say what is its own.
    """
    if device == "cpu" and command.num_workers > 1:
        log.info("energy_not_measured", reason="several workers share the counter of the CPU")
        return None
    try:
        return open_source(command.energy_source, device, command.worker, command.tensor_parallel_size)
    except EnergySourceError as error:
        raise ModelLoadError(f"--energy-source: {error}") from error


def tick(inbox: "queue.SimpleQueue[Command | Tick]") -> None:
    """Body of the thread that has idle time counted."""
    while True:
        time.sleep(TICK_SECONDS)
        inbox.put(Tick())


def worker_main(link: socket.socket, load: Callable[[LoadCommand, Outbox], Loaded] = load_engine) -> int:
    """Serve one link until it ends; returns the process's exit code."""
    inbox: queue.SimpleQueue[Command | Tick] = queue.SimpleQueue()
    outbox = Outbox(link)
    threading.Thread(target=read_commands, args=(link, inbox), daemon=True, name="reader").start()
    command = inbox.get()
    if not isinstance(command, LoadCommand):
        return 0 if isinstance(command, StopCommand) else EXIT_BROKEN
    try:
        loaded = load(command, outbox)
    except ModelLoadError as error:
        return _fatal(outbox, str(error), EXIT_BAD_MODEL)
    except Exception as error:
        log.exception("load_failed")
        return _fatal(outbox, f"the worker could not load: {type(error).__name__}", EXIT_BROKEN)
    meter = None if loaded.energy_source is None else EnergyMeter(loaded.energy_source)
    if meter is not None:
        threading.Thread(target=tick, args=(inbox,), daemon=True, name="energy").start()
    WorkerLoop(loaded.engine, inbox, outbox, meter).run()
    return 0


def _fatal(outbox: Outbox, message: str, exit_code: int) -> int:
    outbox.put(FatalEvent(message=" ".join(message.split()), exit_code=exit_code))
    outbox.flush(wait=True)
    return exit_code


def main() -> NoReturn:
    """Ends the process without the seconds in which Python would unload the models piece by piece."""
    status = run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(NICENESS)
    configure_logging()
    try:
        return worker_main(socket.socket(fileno=worker_link_fd()))
    except OSError:
        return EXIT_BROKEN  # the API process is gone: nobody is left to answer


if __name__ == "__main__":
    main()
