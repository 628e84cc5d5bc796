"""What a type of numbers means on a processor that may not have it."""

import pytest
import torch

from decoding import precision
from decoding.precision import choose_precision


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
