"""The preallocated cache: what is written where, what moves, and that a pass never copies the rest."""

import pytest
import torch
from torch import Tensor

from decoding.config import MAX_TREE_NODES
from decoding.kv_cache import LENGTH_BUCKET, KVCache
from tests.decoding.tiny import CPU

LAYERS, HEADS, DIM = 2, 2, 4


def make_cache(rows: int = 3, capacity: int = 130, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(
        layers=LAYERS, rows=rows, kv_heads=HEADS, capacity=capacity, head_dim=DIM, dtype=dtype, device=CPU
    )


def fill(cache: KVCache) -> Tensor:
    """Give every value its own number; returns a copy."""
    cache.storage.copy_(torch.arange(cache.storage.numel()).view_as(cache.storage))
    return cache.storage.clone()


def test_new_cache_is_zero_and_has_a_column_to_spare() -> None:
    """The trash column lies behind all that can be committed or proposed."""
    cache = make_cache(capacity=128)
    assert cache.capacity == 3 * LENGTH_BUCKET
    assert cache.trash_column == 3 * LENGTH_BUCKET - 1
    assert cache.num_bytes == cache.storage.numel() * 4
    assert not cache.storage.any()
    assert cache.storage.is_contiguous()


def test_update_scatters_and_returns_views() -> None:
    """Guards keys and values swapped, heads mixed, and a gather where a view must do."""
    cache = make_cache()
    columns = torch.tensor([[5, 2], [0, 7]])
    states = torch.randn(2, 2, HEADS, 2, DIM)  # keys or values, rows, heads, tokens, dim
    cache.begin_pass(slice(1, 3), columns, 64)
    keys, values = cache.update(states[0], states[1], 1)
    for row in range(2):
        for token in range(2):
            column = int(columns[row, token])
            assert torch.equal(keys[row, :, column], states[0, row, :, token])
            assert torch.equal(values[row, :, column], states[1, row, :, token])
    assert keys.shape == (2, HEADS, 64, DIM)
    assert keys.untyped_storage().data_ptr() == cache.storage.untyped_storage().data_ptr()
    written = cache.storage.count_nonzero()
    assert written == states.count_nonzero()
    assert not cache.storage[0].any()
    assert not cache.storage[:, :, 0].any()


def test_commit_moves_columns_of_its_rows_only() -> None:
    """All layers, keys and values; overlapping sources and destinations are read before written."""
    cache = make_cache()
    before = fill(cache)
    cache.commit(slice(0, 2), torch.tensor([[4, 6], [3, 2]]), torch.tensor([[3, 4], [2, 3]]))
    expected = before.clone()
    for row, moves in enumerate([[(4, 3), (6, 4)], [(3, 2), (2, 3)]]):
        for source, destination in moves:
            expected[:, :, row, :, destination] = before[:, :, row, :, source]
    assert torch.equal(cache.storage, expected)
    assert cache.columns_moved == 2


def test_move_row_copies_committed_columns_and_the_length() -> None:
    cache = make_cache()
    before = fill(cache)
    cache.lengths[:] = [5, 9, 0]
    cache.move_row(0, 2)
    expected = before.clone()
    expected[:, :, 2, :, :5] = before[:, :, 0, :, :5]
    assert torch.equal(cache.storage, expected)
    assert cache.lengths == [5, 9, 5]


def test_copy_row_copies_as_many_columns_as_it_is_told_and_no_length() -> None:
    cache = make_cache()
    before = fill(cache)
    cache.lengths[:] = [5, 9, 0]
    cache.copy_row(1, 2, 4)
    expected = before.clone()
    expected[:, :, 2, :, :4] = before[:, :, 1, :, :4]
    assert torch.equal(cache.storage, expected)
    assert cache.lengths == [5, 9, 0]


def test_clear_row_zeroes_all_that_a_sequence_can_have_written() -> None:
    """Committed columns, its tree and the trash column; the neighbours stay as they are."""
    cache = make_cache(capacity=200)
    before = fill(cache) + 1
    cache.storage.copy_(before)
    cache.lengths[:] = [5, 9, 7]
    cache.clear_row(1)
    assert not cache.storage[:, :, 1, :, : 9 + 1 + MAX_TREE_NODES].any()
    assert not cache.storage[:, :, 1, :, cache.trash_column].any()
    for row in (0, 2):
        assert torch.equal(cache.storage[:, :, row], before[:, :, row])
    assert cache.lengths == [5, 0, 7]
    cache.clear_row(0, kept=3, written=4)
    assert torch.equal(cache.storage[:, :, 0, :, :3], before[:, :, 0, :, :3])
    assert not cache.storage[:, :, 0, :, 3:9].any()
    assert torch.equal(cache.storage[:, :, 0, :, 9:-1], before[:, :, 0, :, 9:-1])
    assert cache.lengths == [3, 0, 7]


@pytest.mark.parametrize(
    ("lengths", "new", "expected"), [([0, 0], 1, 64), ([3, 63], 1, 64), ([3, 64], 1, 128), ([190, 0], 9, 192)]
)
def test_live_length_is_a_bucket_within_capacity(lengths: list[int], new: int, expected: int) -> None:
    cache = make_cache(rows=2, capacity=130)
    cache.lengths[:] = lengths
    assert cache.live_length(slice(0, 2), new) == expected


def test_length_of_a_pass_is_its_longest_row() -> None:
    cache = make_cache()
    cache.lengths[:] = [5, 9, 7]
    assert cache.get_seq_length() == 0
    cache.begin_pass(slice(1, 3), torch.tensor([[9], [7]]), 64)
    assert cache.get_seq_length() == 9


def test_check_integrity_finds_a_wrong_length() -> None:
    cache = make_cache()
    cache.lengths[:] = [5, 9, 0]
    cache.check_integrity([5, 9])
    with pytest.raises(AssertionError):
        cache.check_integrity([5, 8])
    cache.lengths[2] = cache.capacity
    with pytest.raises(AssertionError):
        cache.check_integrity([5, 9])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_memory_is_of_the_asked_dtype(dtype: torch.dtype) -> None:
    assert make_cache(dtype=dtype).storage.dtype == dtype
