"""Preallocated keys and values of every row, written in place; a rollback is a length."""

import mmap
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from decoding.config import MAX_TREE_NODES
from decoding.host import to_host
from decoding.row_pieces import Piece, cheapest_pieces

LENGTH_BUCKET = 64  # keys are cut to the live length rounded up to this many columns


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class KVCache(Cache):
    """One tensor `[layers, 2, rows, kv_heads, capacity, head_dim]`, handed to stock models as their cache.

    A committed token's column is its position. The nodes of a row's token tree lie behind the
    committed columns, at length + node number. The last column of each row is a trash column.
    `lengths[row]` is the number of committed columns, kept on the host. `pieces` are how attention may
    cut the rows of the pass that runs: long rows apart from short ones.
    """

    def __init__(
        self,
        *,
        layers: int,
        rows: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(layers=[])
        self.capacity = round_up(capacity + 1, LENGTH_BUCKET)
        self.rows = rows
        self.lengths = [0] * rows
        shape = (layers, 2, rows, kv_heads, self.capacity, head_dim)
        self.storage = _allocate(shape, dtype, device)
        self.pieces: tuple[Piece, ...] = ()
        self._column_bytes = 2 * kv_heads * head_dim * dtype.itemsize  # of one row in one layer
        self.columns_moved = 0
        self._by_column = self.storage.view(layers * 2, rows * kv_heads * self.capacity, head_dim)
        self._head_offsets = torch.arange(kv_heads, device=device) * self.capacity
        self._row_stride = kv_heads * self.capacity
        self._row_offsets = torch.arange(rows, device=device) * self._row_stride
        self._columns_of = [self._by_column[number] for number in range(2 * layers)]
        self._rows = slice(0, 0)
        self._live: tuple[Tensor, ...] = ()
        self._slots = torch.empty(0, dtype=torch.long, device=device)

    @property
    def trash_column(self) -> int:
        return self.capacity - 1

    @property
    def num_bytes(self) -> int:
        return self.storage.numel() * self.storage.element_size()

    def live_length(self, rows: slice, num_new: int) -> int:
        """Columns a pass over `rows` must see, with `num_new` columns behind the longest, in buckets."""
        longest = max(self.lengths[rows], default=0)
        return min(round_up(longest + num_new, LENGTH_BUCKET), self.capacity)

    def begin_pass(self, rows: slice, columns: Tensor, live: int) -> None:
        """Set where `update` writes: `columns` `[rows, tokens]`, and how many columns it returns."""
        self._rows = rows
        self._live = self.storage[:, :, rows, :, :live].flatten(0, 1).unbind()
        self.pieces = self._pieces(columns, live)
        self._slots = self._flat_slots(rows, columns)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Scatter this pass's `[rows, kv_heads, tokens, head_dim]`; return views cut to the live length."""
        head_dim = self.storage.shape[-1]
        key, value = 2 * layer_idx, 2 * layer_idx + 1
        self._columns_of[key].index_copy_(0, self._slots, key_states.reshape(-1, head_dim))
        self._columns_of[value].index_copy_(0, self._slots, value_states.reshape(-1, head_dim))
        return self._live[key], self._live[value]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.lengths[self._rows], default=0)

    def commit(self, rows: slice, sources: Tensor, destinations: Tensor) -> None:
        """Move columns inside each row, all layers at once: both arguments `[rows, columns]`."""
        moved = self._by_column.index_select(1, self._flat_slots(rows, sources))
        self._by_column.index_copy_(1, self._flat_slots(rows, destinations), moved)
        self.columns_moved += sources.shape[1]

    def move_row(self, source: int, destination: int) -> None:
        """Copy the committed columns of one row, and its length, into another row."""
        self.copy_row(source, destination, self.lengths[source])
        self.lengths[destination] = self.lengths[source]

    def copy_row(self, source: int, destination: int, length: int) -> None:
        """Copy the first `length` columns of one row into another, lengths apart."""
        self.storage[:, :, destination, :, :length].copy_(self.storage[:, :, source, :, :length])

    def clear_row(self, row: int, *, kept: int = 0, written: int = 1 + MAX_TREE_NODES) -> None:
        """Zero what a sequence may have written, so that no NaN of it can reach the row's next one.

        Its first `kept` columns stay; `written` is how many columns may lie behind the committed ones.
        """
        self.storage[:, :, row, :, kept : self.lengths[row] + written].zero_()
        self.storage[:, :, row, :, self.trash_column].zero_()
        self.lengths[row] = kept

    def check_integrity(self, lengths: list[int]) -> None:
        """Assert that the first rows hold exactly `lengths` and that each fits the capacity."""
        assert self.lengths[: len(lengths)] == lengths, (self.lengths, lengths)
        assert all(0 <= length < self.capacity for length in self.lengths), self.lengths

    def _pieces(self, columns: Tensor, live: int) -> tuple[Piece, ...]:
        """By what each row sees: its committed columns, and up to the last of those that it writes."""
        if columns.device.type != "cpu":  # the host must not wait for lengths, nor may a graph depend on them
            return ((slice(0, len(columns)), live),)
        lives = [min(round_up(last + 1, LENGTH_BUCKET), live) for last in to_host(columns[:, -1])]
        return cheapest_pieces(tuple(lives), self._column_bytes)

    def _flat_slots(self, rows: slice, columns: Tensor) -> Tensor:
        base = self._row_offsets[rows, None] + columns
        return (base[:, None, :] + self._head_offsets[None, :, None]).reshape(-1)


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Anonymous pages are zero and take memory only when first touched, which torch.zeros would do at once.
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype).view(shape)
