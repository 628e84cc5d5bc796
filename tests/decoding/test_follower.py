"""What rank 0 does with its share, told to another share, leaves both with the same columns."""

import functools
import io
import os
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from decoding import ModelLoadError, follower
from decoding.follower import ShareOfModel, read_orders
from decoding.followers import Followers, LeadingModel
from decoding.ranks import Order, Share, ShareOfCache
from decoding.token_tree import TokenTree
from tests.decoding.tiny import CPU, VOCAB, tiny_llama

SETTINGS: dict[str, Any] = {"rows": 3, "max_model_len": 96, "vocab_size": VOCAB}


class Recorder(Followers):
    """Followers that are not there: keeps the orders and their tensors."""

    def __init__(self) -> None:
        self.ranks = 1
        self.told_so_far: list[tuple[Order, list[Tensor]]] = []

    def tell(self, operation: str, numbers: Any, tensors: Any = ()) -> None:
        order = Order.from_line(Order.of(operation, numbers, tensors).to_line())
        self.told_so_far.append((order, [each.clone() for each in tensors]))


@contextmanager
def obeying(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShareOfModel]:
    """A second copy of the model that has done all that was recorded when the context ends."""
    make_cache = functools.partial(ShareOfCache, 1)
    share = ShareOfModel(tiny_llama(), device=CPU, make_cache=make_cache, **SETTINGS)
    yield share
    (serve, _), *rest = recorder.told_so_far
    assert (serve.operation, serve.numbers) == ("serve", [*SETTINGS.values()])
    for order, tensors in rest:
        monkeypatch.setattr(follower, "receive", lambda *_, tensors=tensors: tensors)
        share.obey(order)


def test_a_share_obeys_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    leader = LeadingModel(tiny_llama(), recorder, device=CPU, **SETTINGS)
    rows, lengths = slice(0, 2), torch.tensor([5, 3])
    with obeying(recorder, monkeypatch) as share, torch.inference_mode():
        leader.prefill(0, [3, 1, 4, 1, 5])
        leader.prefill(1, [9, 2, 6])
        leader.forward(rows, lengths, TokenTree.chain_of(torch.tensor([[1, 2, 3], [4, 5, 6]])))
        leader.commit(rows, lengths, torch.tensor([[1, 2], [1, 0]]))
        leader.catch_up(rows, lengths, torch.tensor([[5, 7], [6, 8]]))
        leader.cache.move_row(0, 2)
        leader.cache.clear_row(1, kept=1)
        leader.plain_logits([1, 2, 3])
    done = [order.operation for order, _ in recorder.told_so_far[1:]]
    assert done == [*["run"] * 3, "commit", "run", "copy_row", "clear_row", "plain_logits"]
    assert torch.equal(share.cache.storage, leader.cache.storage)
    assert share.cache.storage[:, :, 2, :, :5].all()
    with pytest.raises(AssertionError):
        share.obey(Order("retire", []))


def test_a_share_holds_its_heads_alone() -> None:
    shape: dict[str, Any] = {"rows": 2, "capacity": 64, "head_dim": 4, "dtype": torch.float32, "device": CPU}
    assert ShareOfCache(2, layers=1, kv_heads=6, **shape).storage.shape[3] == 3


def test_the_end_of_the_pipe_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
    lines = io.StringIO(Order("clear_row", [0, 4, 1, 2]).to_line())
    with pytest.raises(SystemExit) as end:
        read_orders(lines, orders)
    assert end.value.code == 0
    assert orders.get(block=False) == Order("clear_row", [0, 4, 1, 2], [])


SHARE = Share(1, 2, 3, "some/model", "float32", "cpu")


class RankZeroIsGoneError(Exception):
    """In the place of an order that never comes."""


class NoOrders(queue.SimpleQueue[Order]):
    def get(self, block: bool = True, timeout: float | None = None) -> Order:
        raise RankZeroIsGoneError


@pytest.mark.parametrize("reason", ["", "cannot load the model; check the path"])
def test_a_rank_says_how_its_load_ended(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: dict[str, str] = {}

    def load_module(*_: Any) -> None:
        if reason:
            raise ModelLoadError(reason)

    monkeypatch.setattr(follower, "join", lambda share: SimpleNamespace(set=said.__setitem__))
    monkeypatch.setattr(follower, "load_module", load_module)
    with pytest.raises(RankZeroIsGoneError):
        follower.load(SHARE, NoOrders())
    assert said == {"loaded 1": reason}


def test_a_rank_that_fails_gives_rank_0_the_time_to_say_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slept: list[float] = []

    def leave(status: int) -> None:
        raise SystemExit(status)

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("sys.stdin", io.StringIO(SHARE.to_line()))
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr(follower, "read_orders", lambda *_: None)
    monkeypatch.setattr(follower, "load", fail)
    with pytest.raises(SystemExit) as end:
        follower.main()
    assert (end.value.code, slept) == (follower.EXIT_FAILED, [follower.GRACE_SECONDS])
    assert "rank 1 failed" in caplog.text
    assert "no memory" in caplog.text
