"""Rank 0 of a split target: starts the other ranks, tells them what it does, and ends with any of them."""

import contextlib
import functools
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from collections.abc import Sequence as Series
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decoding.config import MAX_TREE_NODES
from decoding.errors import ModelLoadError, RankError
from decoding.model import CausalModel
from decoding.passes import Pass
from decoding.ranks import LOADED, Order, Share, ShareOfCache, join, send

EXIT_RANK_LOST = 1
STDERR = 2
LOAD_TIMEOUT = timedelta(days=1)  # who started this process decides how long it may load

logger = logging.getLogger(__name__)


class Followers:
    """Ranks 1 to N - 1, child processes of this one. Only one target of a process can be split."""

    def __init__(self, ranks: int, *, target: str, dtype: str, device: str) -> None:
        """Start them; they load their shares of `target` while this process loads its own."""
        self.ranks = ranks
        # A file without a name: nobody else can open it, and it is gone with its last process.
        store = os.memfd_create("ranks")
        shares = [Share(rank, ranks, store, target, dtype, device) for rank in range(ranks)]
        self._processes = [_start(share) for share in shares[1:]]
        self._store = join(shares[0])
        self._store.set_timeout(LOAD_TIMEOUT)

    def confirm(self) -> None:
        """Wait until all have loaded; raises ModelLoadError with the line of one that could not."""
        for rank in range(1, self.ranks):
            reason = self._store.get(f"{LOADED} {rank}").decode()
            if reason:
                raise ModelLoadError(reason)

    def tell(self, operation: str, numbers: Series[int], tensors: Series[Tensor] = ()) -> None:
        line = Order.of(operation, numbers, tensors).to_line()
        for process in self._processes:
            _write(process, line)
        if tensors:
            send(tensors)

    @contextlib.contextmanager
    def told(self, operation: str, numbers: Series[int], tensors: Series[Tensor] = ()) -> Iterator[None]:
        """Around an operation of this rank: the others do it too.

        Raises:
            RankError: it failed here, so the others wait inside it for what will never come.
        """
        try:
            self.tell(operation, numbers, tensors)
            yield
        except Exception as error:
            raise RankError(f"the target's {operation} failed on rank 0") from error


def _start(share: Share) -> "subprocess.Popen[bytes]":
    """A rank that reads orders, and the thread that ends this process with it."""
    # The rank's device is read from its environment by transformers.
    program = [shutil.which("env") or "/usr/bin/env", f"LOCAL_RANK={share.rank}", sys.executable]
    process = subprocess.Popen(  # noqa: S603 - the command line is ours
        [*program, "-m", "decoding.follower"],
        stdin=subprocess.PIPE,
        stdout=STDERR,
        pass_fds=(share.store,),
    )
    _write(process, share.to_line())
    threading.Thread(target=_end_with, args=(share.rank, process), daemon=True, name="rank").start()
    return process


def _write(process: "subprocess.Popen[bytes]", line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line.encode())
    process.stdin.flush()


def _end_with(rank: int, process: "subprocess.Popen[bytes]") -> NoReturn:
    """A step that waits for a rank which is gone may wait for ever: so nothing waits for the step."""
    status = process.wait()
    logger.error("rank %d of the target ended (status %d): so does this process", rank, status)
    os._exit(EXIT_RANK_LOST)


class LeadingCache(ShareOfCache):
    """What is done to the share of this rank is done by every rank to its own."""

    def __init__(self, followers: Followers, **settings: Any) -> None:
        super().__init__(followers.ranks, **settings)
        self._followers = followers

    @property
    def num_bytes(self) -> int:
        """Of all ranks."""
        return super().num_bytes * self._followers.ranks

    def commit(self, rows: slice, sources: Tensor, destinations: Tensor) -> None:
        with self._followers.told("commit", [rows.start, rows.stop], [sources, destinations]):
            super().commit(rows, sources, destinations)

    def copy_row(self, source: int, destination: int, length: int) -> None:
        with self._followers.told("copy_row", [source, destination, length]):
            super().copy_row(source, destination, length)

    def clear_row(self, row: int, *, kept: int = 0, written: int = 1 + MAX_TREE_NODES) -> None:
        with self._followers.told("clear_row", [row, self.lengths[row], kept, written]):
            super().clear_row(row, kept=kept, written=written)


class LeadingModel(CausalModel):
    """This rank's share of a model; what it runs is run by every rank."""

    def __init__(
        self,
        module: PreTrainedModel,
        followers: Followers,
        *,
        rows: int,
        max_model_len: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.ranks = followers.ranks
        self._followers = followers
        followers.tell("serve", [rows, max_model_len, vocab_size])
        super().__init__(
            module,
            rows=rows,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            device=device,
            make_cache=functools.partial(LeadingCache, followers),
        )

    def plain_logits(self, token_ids: list[int]) -> Tensor:
        with self._followers.told("plain_logits", token_ids):
            return super().plain_logits(token_ids)

    def _run(self, rows: slice, inputs: Pass, keep: int) -> Tensor:
        tensors = [inputs.token_ids, inputs.columns, inputs.positions, inputs.key_positions, inputs.mask]
        with self._followers.told("run", [rows.start, rows.stop, keep], tensors):
            return super()._run(rows, inputs, keep)
