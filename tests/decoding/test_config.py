"""Bounds of `DecodingConfig`, and which sequences may share a pass."""

import math
from typing import Any

import pytest

from decoding import MAX_BEAM_WIDTH, MAX_SPECULATIVE_TOKENS, METHODS, DecodingConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "mtjd "),
        ("num_speculative_tokens", 0),
        ("num_speculative_tokens", MAX_SPECULATIVE_TOKENS + 1),
        ("beam_width", 0),
        ("beam_width", MAX_BEAM_WIDTH + 1),
        ("acceptance_threshold", -0.1),
        ("acceptance_threshold", math.nan),
        ("acceptance_reference", "own"),
    ],
)
def test_value_out_of_bounds_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} "):
        DecodingConfig(**{field: value})


def test_tree_size_is_bounded() -> None:
    """The caches reserve room for 64 nodes behind a row."""
    DecodingConfig(beam_width=16, num_speculative_tokens=4)
    with pytest.raises(ValueError, match="^beam_width times num_speculative_tokens"):
        DecodingConfig(beam_width=13, num_speculative_tokens=5)


@pytest.mark.parametrize("threshold", [0, 1, math.inf])
def test_extreme_thresholds_are_allowed(threshold: float) -> None:
    assert DecodingConfig(acceptance_threshold=threshold).acceptance_threshold == threshold


def test_preset_holds_only_what_shapes_the_pass() -> None:
    """Rows that differ in unused numbers or in tau share one pass."""
    presets = {method: DecodingConfig(method, 3, 5).preset for method in METHODS}
    assert presets == {
        "target": ("target", 0, 0),
        "draft": ("draft", 0, 0),
        "speculative": ("speculative", 3, 1),
        "mtad": ("mtad", 3, 5),
        "mmtad": ("mmtad", 3, 5),
    }
    assert DecodingConfig(acceptance_threshold=0.1).preset == DecodingConfig().preset


def test_models_a_method_uses() -> None:
    used = {name: (c.uses_target, c.uses_draft) for name in METHODS for c in [DecodingConfig(name)]}
    assert used.pop("target") == (True, False)
    assert used.pop("draft") == (False, True)
    assert set(used.values()) == {(True, True)}
