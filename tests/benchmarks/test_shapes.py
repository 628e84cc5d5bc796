"""Pair S: random weights in given shapes, and the rows that synthetic acceptance gives."""

from typing import Any

import pytest
import torch

from benchmarks import decode, shapes
from benchmarks.shapes import SHAPES, build_shapes, load_shapes


def small() -> dict[str, dict[str, Any]]:
    """The shapes of the embedded kind, small enough for a test."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {role: {**shape, **sizes, **heads} for role, shape in SHAPES["smollm2-360m-2-layers"].items()}


def test_shapes_are_built_with_random_weights() -> None:
    pair = build_shapes(small(), device=torch.device("cpu"), dtype=torch.float32, rows=2, max_model_len=32)
    assert pair.vocab_size == 64
    assert pair.target.prefill(0, [1, 2, 3]).shape == (1, 64)


def test_unknown_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="no shapes 'X'; there are: llama-8b-1b"):
        load_shapes("X", rows=1)


def test_rows_reach_the_block_efficiency_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "llama-8b-1b", small())
    sizes = ["--block-efficiencies", "2.5", "--batches", "2", "--repeats", "1", "--max-tokens", "96"]
    arguments = decode.parse_arguments(["--pair", "S", *sizes])
    shown: list[str] = []
    document = decode.run(arguments, shown.append)
    assert [row["method"] for row in document["rows"]] == [
        "target", "speculative", "multi 4x1x1x1", "mtad", "mmtad",
    ]  # fmt: skip
    assert document["rows"][0]["BE"] == 1
    for row in document["rows"][1:]:
        assert row["BE"] == pytest.approx(2.5, rel=0.05)
        assert 0 < row["S_bound"] <= row["S_free"] * 1.5
    assert len(shown) == 2 + len(document["rows"])
