"""The processes that hold one target, its ranks: how they meet, and how rank 0 says what all of them do.

Orders go down a pipe to each other rank, whose end is the end of rank 0. Tensors, and within a pass the
sums over the shares, go through torch.distributed.
"""

import json
import os
from collections.abc import Sequence as Series
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from decoding.kv_cache import KVCache

LOADED = "loaded"  # with the rank: the error of its load, empty without one
INTERFACE = "lo"  # all ranks of a target are on one machine


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank is started for: its place, where the ranks meet, the target and how to hold it."""

    rank: int
    ranks: int
    store: int  # descriptor of the file where they meet
    target: str
    dtype: str
    device: str

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Self:
        return cls(**json.loads(line))


@dataclass(frozen=True, slots=True)
class Order:
    """One operation on the share of every rank: its numbers, the types and shapes of its tensors."""

    operation: str
    numbers: Series[int]
    layouts: Series[tuple[str, Series[int]]] = ()

    @classmethod
    def of(cls, operation: str, numbers: Series[int], tensors: Series[Tensor]) -> Self:
        layouts = [(str(each.dtype).removeprefix("torch."), list(each.shape)) for each in tensors]
        return cls(operation, numbers, layouts)

    def to_line(self) -> str:
        return json.dumps([self.operation, self.numbers, self.layouts]) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Self:
        return cls(*json.loads(line))


class ShareOfCache(KVCache):
    """The cache of one rank, which holds its share of the heads."""

    def __init__(self, ranks: int, *, kv_heads: int, **settings: Any) -> None:
        super().__init__(kv_heads=kv_heads // ranks, **settings)


def join(share: Share) -> Store:
    """Meet the other ranks in one group, on the loopback interface alone; returns what they all can read."""
    for library in ("GLOO", "NCCL"):
        os.putenv(f"{library}_SOCKET_IFNAME", INTERFACE)
    if share.device == "cuda":
        torch.cuda.set_device(share.rank)
    path = f"/proc/self/fd/{share.store}"
    store: Store = dist.FileStore(path, share.ranks)  # type: ignore[attr-defined]
    backend = "nccl" if share.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=share.rank, world_size=share.ranks)
    return store


def send(tensors: Series[Tensor]) -> None:
    """From rank 0 to all others, in one piece; wider types come first, so that all lie aligned."""
    widths = [each.element_size() for each in tensors]
    assert widths == sorted(widths, reverse=True), widths
    dist.broadcast(torch.cat([each.reshape(-1).view(torch.uint8) for each in tensors]), src=0)


def receive(order: Order, device: torch.device) -> list[Tensor]:
    """The tensors of an order, as rank 0 sends them."""
    layouts = [(getattr(torch, name), torch.Size(shape)) for name, shape in order.layouts]
    sizes = [shape.numel() * dtype.itemsize for dtype, shape in layouts]
    if not sizes:
        return []
    whole = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    dist.broadcast(whole, src=0)
    parts = torch.split(whole, sizes)
    return [part.view(dtype).view(shape) for part, (dtype, shape) in zip(parts, layouts, strict=True)]
