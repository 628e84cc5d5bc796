"""Which errors of a device leave it usable."""

import logging

import pytest
import torch

from decoding.device_errors import is_device_lost, is_out_of_memory, release_memory
from decoding.errors import RankError

NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory", 2),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]
LOST = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RankError("the target's run failed on rank 0"),
]
NEITHER = [RuntimeError("a shape is wrong"), ValueError("CUDA"), torch.linalg.LinAlgError("singular")]


@pytest.mark.parametrize("error", [*NO_MEMORY, *LOST, *NEITHER], ids=repr)
def test_kinds(error: Exception) -> None:
    assert is_out_of_memory(error) == (error in NO_MEMORY)
    assert is_device_lost(error) == (error in LOST)


def test_what_the_failed_step_held_is_given_back() -> None:
    """Its frames live in the traceback, and with them every tensor that it had computed so far."""

    class Large:
        pass

    alive = []

    def step() -> None:
        import weakref

        held = Large()
        alive.append(weakref.ref(held))
        raise torch.OutOfMemoryError("no more")

    try:
        step()
    except torch.OutOfMemoryError as error:
        assert alive[0]() is not None
        release_memory(error, torch.device("cpu"))
        assert alive[0]() is None


def test_an_allocator_that_gives_nothing_back_is_told_and_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    with caplog.at_level(logging.WARNING):
        release_memory(torch.OutOfMemoryError("no more"), torch.device("cuda"))
    assert "gives nothing back: captures_underway" in caplog.text
