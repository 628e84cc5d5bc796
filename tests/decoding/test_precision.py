"""What a type of numbers means on a processor that may not have it."""

import os
import subprocess
import sys

import pytest
import torch

from decoding import precision
from decoding.precision import choose_device, choose_precision


@pytest.mark.parametrize(
    ("capability", "dtype", "note"),
    [
        ("AVX512", torch.bfloat16, "bfloat16"),
        ("AVX2", torch.float32, "float32 (bfloat16 upcast: this CPU has no AVX-512)"),
    ],
)
def test_bfloat16_needs_a_processor_that_has_it(
    capability: str, dtype: torch.dtype, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    chosen = choose_precision("bfloat16", torch.device("cpu"))
    assert (chosen.dtype, chosen.note) == (dtype, note)


@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
def test_processor_without_float16_layers_computes_in_float32(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "float16_linear_available", lambda: False)
    chosen = choose_precision(dtype, torch.device("cpu"))
    assert (chosen.dtype, chosen.float16_linear) == (torch.float32, False)


@pytest.mark.parametrize("threads", [None, "1"])
def test_a_pair_keeps_to_the_threads_that_it_was_given(threads: str | None) -> None:
    """Or several workers on one machine would each take every core."""
    program = (
        "import torch; from decoding.precision import *; choose_device('cpu'); print(torch.get_num_threads())"
    )
    given = {} if threads is None else {"OMP_NUM_THREADS": threads}
    environment = {name: each for name, each in os.environ.items() if name != "OMP_NUM_THREADS"} | given
    told = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert int(told.stdout) == int(threads or len(os.sched_getaffinity(0)))


def test_a_rank_has_its_share_of_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    choose_device("cpu", 2)
    choose_device("cpu", 8)
    assert asked == [2, 1]


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_a_split_target_has_no_float16_layers(dtype: str) -> None:
    chosen = choose_precision(dtype, torch.device("cpu"), 2)
    assert (chosen.dtype, chosen.float16_linear) == (torch.float32, False)
    assert "a split target has no float16" in chosen.note
