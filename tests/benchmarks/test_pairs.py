"""Pairs by name: what inflation changes and what it does not, and random weights in given shapes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.pairs import TINY_FOLDERS, inflate, linear_bytes, load_pair
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


def test_unknown_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="no pair 'X'; there are: E, T, I"):
        load_pair("X")


@pytest.mark.slow
def test_the_small_pair_has_its_label_and_sizes() -> None:
    pair = load_pair("I", base="T", extra_layers=2, max_num_seqs=2)
    assert (pair.label, pair.base) == ("I(T+2)", "T")
    assert pair.parameters[0] > pair.parameters[1] > 50_000
    assert pair.step_bytes > 500_000


@pytest.mark.slow
def test_another_draft_takes_the_place_of_the_own_one() -> None:
    pair = load_pair("T", draft=TINY_FOLDERS[0], max_num_seqs=2)
    assert pair.label == "T, draft tiny-sql"
    assert pair.parameters[0] == pair.parameters[1]
