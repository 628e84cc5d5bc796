"""A target over two real ranks: the texts of one, and the end of both with either."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from decoding import followers, loading
from decoding.errors import ModelLoadError, RankError
from decoding.followers import Followers
from tests.decoding import split_texts
from tests.decoding.checkpoints import save_checkpoint
from tests.decoding.tiny import METHODS

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_two_ranks_give_the_texts_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "CACHE_DIR", tmp_path / "cache")
    pair = save_checkpoint(tmp_path / "target"), save_checkpoint(tmp_path / "draft", seed=1)
    child = subprocess.run(
        [sys.executable, "-m", "tests.decoding.split_texts", *pair],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.stdout, child.stderr
    found = json.loads(child.stdout)
    whole = split_texts.load(*pair, ranks=1)
    assert found["texts"] == split_texts.texts(whole)
    assert len(found["texts"]) == 2 * len(METHODS)
    assert "target (llama, 0M) over 2 ranks + draft draft (llama, 0M)" in found["description"]
    assert found["memory_bytes"] == whole.memory_bytes
    # It was asleep when rank 1 was killed.
    assert child.returncode == followers.EXIT_RANK_LOST
    assert "rank 1 of the target ended (status -9)" in child.stderr


class Alone(Followers):
    """Without processes: what would be told."""

    def __init__(self) -> None:
        self.ranks = 2
        self.orders: list[str] = []

    def tell(self, operation: str, *_: Any) -> None:
        self.orders.append(operation)


def test_an_operation_that_fails_here_ends_all() -> None:
    alone = Alone()
    with alone.told("commit", []):
        pass
    with pytest.raises(RankError, match="the target's run failed on rank 0") as error, alone.told("run", []):
        raise RuntimeError("CUDA out of memory")
    assert str(error.value.__cause__) == "CUDA out of memory"
    assert alone.orders == ["commit", "run"]


def test_the_line_of_a_rank_that_cannot_load_is_the_error() -> None:
    class Store:
        def get(self, key: str) -> bytes:
            return {"loaded 1": b"", "loaded 2": b"no weights"}[key]

    group = Alone()
    group.ranks, group._store = 3, Store()  # type: ignore[assignment]
    with pytest.raises(ModelLoadError, match="^no weights$"):
        group.confirm()
