"""`python -m decoding.follower`: one rank of a split target behind rank 0, whose orders it reads.

It ends with the pipe that they come from, whatever it is in the middle of.
"""

import functools
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Iterable
from typing import NoReturn

import torch
from torch import Tensor

from decoding.checkpoint import Source, load_module
from decoding.errors import ModelLoadError
from decoding.model import CausalModel
from decoding.passes import Pass
from decoding.precision import choose_device, choose_precision
from decoding.ranks import LOADED, Order, Share, ShareOfCache, join, receive

EXIT_FAILED = 1
GRACE_SECONDS = 1.0  # where the model is to blame, rank 0 fails likewise and can say so before this ends it

logger = logging.getLogger(__name__)


class ShareOfModel(CausalModel):
    """One rank's share of a model, which does what it is told; lengths are kept by rank 0 alone."""

    def obey(self, order: Order) -> None:
        numbers, tensors = order.numbers, receive(order, self.device)
        match order.operation:
            case "run":
                self._pass(slice(*numbers[:2]), tensors, keep=numbers[2])
            case "commit":
                self.cache.commit(slice(*numbers), *tensors)
            case "copy_row":
                self.cache.copy_row(*numbers)
            case "clear_row":
                row, length, kept, written = numbers
                self.cache.lengths[row] = length
                self.cache.clear_row(row, kept=kept, written=written)
            case "plain_logits":
                self.plain_logits(list(numbers))
            case _:
                raise AssertionError(order)

    def _pass(self, rows: slice, tensors: list[Tensor], keep: int) -> None:
        token_ids, columns, positions, key_positions, mask = tensors
        self._run(rows, Pass(token_ids, columns, positions, mask, key_positions), keep)
        self.timer.take()


def read_orders(lines: Iterable[str], orders: "queue.SimpleQueue[Order]") -> NoReturn:
    """Body of the reader thread: ends the process with the pipe, however stuck a pass may be."""
    for line in lines:
        orders.put(Order.from_line(line))
    os._exit(0)


def load(share: Share, orders: "queue.SimpleQueue[Order]") -> ShareOfModel:
    """Load the share, say so, and allocate what rank 0 then asks for."""
    place = choose_device(share.device, share.ranks)
    dtype = choose_precision(share.dtype, place, share.ranks).dtype
    store, reason = join(share), ""
    try:
        module = load_module(Source.of(share.target), None, dtype, share.ranks)
    except ModelLoadError as error:
        reason = str(error)
    store.set(f"{LOADED} {share.rank}", reason)
    order = orders.get()  # never comes after a reason: rank 0 ends
    assert order.operation == "serve", order
    rows, max_model_len, vocab_size = order.numbers
    return ShareOfModel(
        module,
        rows=rows,
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        device=torch.device(share.device, share.rank) if share.device == "cuda" else place,
        make_cache=functools.partial(ShareOfCache, share.ranks),
    )


@torch.inference_mode()
def main() -> NoReturn:
    share = Share.from_line(sys.stdin.readline())
    orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
    threading.Thread(target=read_orders, args=(sys.stdin, orders), daemon=True, name="reader").start()
    try:
        model = load(share, orders)
        while True:
            model.obey(orders.get())
    except Exception:
        logger.exception("rank %d failed", share.rank)
        time.sleep(GRACE_SECONDS)
    os._exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
