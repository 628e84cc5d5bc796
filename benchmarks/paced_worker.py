"""A worker without a model: `python -m benchmarks.paced_worker STEP_SECONDS TOKENS CORE --link-fd N`.

It decodes as a device of that speed would: every `STEP_SECONDS` each of its rows gets `TOKENS` tokens, a few
words over and over, through the worker's own loop, frames and link. It runs on the core with number CORE.
"""

import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from decoding import FinishReason, ForwardTime, Sequence, SequenceOutput, StepStats
from server import worker
from server.config import worker_link_fd
from server.link import Outbox
from server.messages import LoadCommand, ReadyEvent

TOKENIZER = Path(__file__).parent.parent / "models/tiny-sql/tokenizer.json"
TEXT = "SELECT name, count(*) FROM users WHERE age > 30 GROUP BY name ORDER BY name;\n"
MAX_MODEL_LEN = 32_768
DEPTH = 4


class PacedEngine:
    """Delivers `num_tokens` for every row once in `step_seconds`, without catching up on late steps."""

    draft_enabled = True

    def __init__(self, token_ids: list[int], max_num_seqs: int, step_seconds: float, num_tokens: int) -> None:
        self.last_step = StepStats()
        self._token_ids = token_ids
        self._max_num_seqs = max_num_seqs
        self._step_seconds = step_seconds
        self._num_tokens = num_tokens
        self._due = 0.0  # monotonic seconds
        self._running: dict[str, Sequence] = {}
        self._waiting: deque[Sequence] = deque()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def cache_usage(self) -> dict[str, float]:
        return {"target": self.num_running / self._max_num_seqs}

    def retreat(self, error: Exception) -> None:
        return None

    def is_device_lost(self, error: Exception) -> bool:
        return True

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def cancel(self, sequence_id: str) -> bool:
        before = self.num_running + self.num_waiting
        self._running.pop(sequence_id, None)
        self._waiting = deque(each for each in self._waiting if each.id != sequence_id)
        return self.num_running + self.num_waiting < before

    def step(self) -> Iterable[SequenceOutput]:
        now = time.monotonic()
        time.sleep(max(self._due - now, 0.0))
        self._due = max(self._due, now) + self._step_seconds
        while self._waiting and self.num_running < self._max_num_seqs:
            sequence = self._waiting.popleft()
            self._running[sequence.id] = sequence
        rows = list(self._running.values())
        method, ids = rows[0].config.method, tuple(self._running)
        self.last_step = StepStats(
            method,
            rows[0].config.preset.name,
            len(rows),
            num_tree_nodes=DEPTH * len(rows),
            decode_seconds=self._step_seconds,
            decode_ids=ids,
            forward_times=(ForwardTime("target", "decode", method, 1, self._step_seconds, ids),),
        )
        return [self._advance(sequence) for sequence in rows]

    def _advance(self, sequence: Sequence) -> SequenceOutput:
        start, count = len(sequence.output_ids), min(self._num_tokens, sequence.remaining)
        new = [self._token_ids[(start + place) % len(self._token_ids)] for place in range(count)]
        sequence.output_ids += new
        ended = sequence.remaining == 0
        if ended:
            del self._running[sequence.id]
        return SequenceOutput(
            sequence.id,
            new,
            [-0.5] * count,
            finish_reason=FinishReason.LENGTH if ended else None,
            num_draft_tokens=DEPTH,
            num_draft_nodes=DEPTH,
            num_accepted_tokens=min(count - 1, DEPTH),
        )


def loader(step_seconds: float, num_tokens: int) -> Callable[[LoadCommand, Outbox], worker.Loaded]:
    def load(command: LoadCommand, outbox: Outbox) -> worker.Loaded:
        tokenizer: Any = Tokenizer.from_file(str(TOKENIZER))
        token_ids: list[int] = tokenizer.encode(TEXT, add_special_tokens=False).ids
        ready = ReadyEvent(
            vocab_size=tokenizer.get_vocab_size(),
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=[],
            bos_token_id=None,
            tokenizer_file=str(TOKENIZER),
            has_draft=True,
            description="no models: tokens at a fixed pace",
            device="cpu",
            memory_bytes=0,
            load_seconds=0.0,
        )
        outbox.put(ready)
        outbox.flush(wait=True)
        return worker.Loaded(PacedEngine(token_ids, command.max_num_seqs, step_seconds, num_tokens))

    return load


def main() -> int:
    step_seconds, num_tokens, core = float(sys.argv.pop(1)), int(sys.argv.pop(1)), int(sys.argv.pop(1))
    os.sched_setaffinity(0, {core})
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return worker.worker_main(socket.socket(fileno=worker_link_fd()), loader(step_seconds, num_tokens))


if __name__ == "__main__":
    raise SystemExit(main())
