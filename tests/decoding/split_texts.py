"""Decodes with a target of two ranks, then loses one: `python -m tests.decoding.split_texts TARGET DRAFT`.

One line on standard output: what it loaded, the texts by sequence id. Then rank 1 is killed.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from decoding import Engine, ModelPair, load_model_pair
from tests.decoding.tiny import METHODS, drain, request

ROWS = 4


def load(target: str, draft: str, ranks: int) -> ModelPair:
    return load_model_pair(
        target, draft, device="cpu", dtype="float32", max_num_seqs=ROWS, tensor_parallel_size=ranks
    )


def texts(pair: ModelPair) -> dict[str, list[int]]:
    """More sequences than rows, of all methods, greedy and sampled, some of which begin alike."""
    engine = Engine(pair, max_num_seqs=ROWS)
    for number, method in enumerate(METHODS):
        for temperature in (0.0, 1.0):
            prompt = [3, 7, 5, *range(4, 10 + number % 3)]
            fields: dict[str, Any] = {"temperature": temperature, "max_tokens": 16, "ignore_eos": True}
            engine.add(request(f"{method} {temperature}", prompt, method, seed=number, **fields))
    return {name: text.token_ids for name, text in drain(engine, check=True).items()}


def main() -> None:
    pair = load(*sys.argv[1:], ranks=2)
    found = {"description": pair.description, "memory_bytes": pair.memory_bytes, "texts": texts(pair)}
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    own = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    (follower,) = map(int, own.split())
    os.kill(follower, signal.SIGKILL)
    time.sleep(60)


if __name__ == "__main__":
    main()
