"""Pairs by name: what inflation changes and what it does not, and random weights in given shapes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.pairs import SHAPES, build_shapes, inflate, linear_bytes, load_pair
from benchmarks.tiny.train import Shape, save

IDS = torch.tensor([[1, 5, 9, 20]])


def test_inflated_layers_cost_but_change_nothing(tmp_path: Path) -> None:
    save(Shape(2, 32).build(0), tmp_path / "plain")
    inflate(tmp_path / "plain", 3, tmp_path / "inflated")
    plain, inflated = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("plain", "inflated")
    )
    assert inflated.config.num_hidden_layers == 5
    assert torch.equal(plain(IDS).logits, inflated(IDS).logits)
    per_layer = (linear_bytes(plain) - linear_bytes(plain.lm_head)) // 2
    assert linear_bytes(inflated) == linear_bytes(plain) + 3 * per_layer


def test_unknown_pairs_and_shapes_without_a_gpu_are_refused() -> None:
    with pytest.raises(ValueError, match="no pair 'X'; there are: E, T, I, S"):
        load_pair("X")
    with pytest.raises(ValueError, match="not run here without a GPU"):
        load_pair("S")


def test_shapes_are_built_with_random_weights() -> None:
    small = {
        role: {**shape, "vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
        for role, shape in SHAPES.items()
    }
    pair = build_shapes(small, device=torch.device("cpu"), dtype=torch.float32, rows=2, max_model_len=32)
    assert pair.vocab_size == 50
    assert pair.target.prefill(0, [1, 2, 3]).shape == (1, 50)


@pytest.mark.slow
def test_the_small_pair_has_its_label_and_sizes() -> None:
    pair = load_pair("I", base="T", extra_layers=2, max_num_seqs=2)
    assert (pair.label, pair.base) == ("I(T+2)", "T")
    assert pair.parameters[0] > pair.parameters[1] > 50_000
    assert pair.step_bytes > 500_000
