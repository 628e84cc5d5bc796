"""Bounds of `DecodingConfig`, and which sequences may share a pass."""

import math
from typing import Any

import pytest

from decoding import MAX_BEAM_WIDTH, MAX_SPECULATIVE_TOKENS, METHODS, DecodingConfig
from decoding.config import Preset


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
        ("acceptance", "tokens"),
        ("candidates_per_level", ()),
        ("candidates_per_level", (1,) * (MAX_SPECULATIVE_TOKENS + 1)),
        ("candidates_per_level", (4, 0)),
        ("candidates_per_level", (17,)),
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


@pytest.mark.parametrize("candidates", [(16, 4), (2, 2, 2, 2, 2, 2), (16, 1, 1, 1, 1)])
def test_tree_of_candidates_is_bounded_by_all_its_levels(candidates: tuple[int, ...]) -> None:
    """A product of at most 64 leaves in the last level would let the tree outgrow the caches' room."""
    DecodingConfig(candidates_per_level=candidates[:-1])
    with pytest.raises(ValueError, match="^candidates_per_level must give a tree of at most 64 nodes"):
        DecodingConfig(candidates_per_level=candidates)


def test_preset_of_candidates_knows_its_nodes() -> None:
    preset = DecodingConfig("multi_candidate", candidates_per_level=(4, 2, 2)).preset
    assert preset.num_nodes == 1 + 4 + 8 + 16
    assert DecodingConfig("mtjd", 3, 5).preset.num_nodes == 16
    assert (
        DecodingConfig("multi_candidate", candidates_per_level=(4, 2, 2), replacement=True).preset != preset
    )
    assert DecodingConfig("speculative", acceptance="block").preset != DecodingConfig("speculative").preset


@pytest.mark.parametrize("threshold", [0, 1, math.inf])
def test_extreme_thresholds_are_allowed(threshold: float) -> None:
    assert DecodingConfig(acceptance_threshold=threshold).acceptance_threshold == threshold


def test_preset_holds_only_what_shapes_the_pass() -> None:
    """Rows that differ in unused numbers or in tau share one pass."""
    presets = {method: DecodingConfig(method, 3, 5).preset for method in METHODS}
    assert presets == {
        "target": Preset("target"),
        "draft": Preset("draft"),
        "speculative": Preset("speculative", 3, 1),
        "multi_candidate": Preset("multi_candidate", 3, candidates=(4, 2, 2)),
        "mtjd": Preset("mtjd", 3, 5),
        "mtad": Preset("mtad", 3, 5),
        "mmtad": Preset("mmtad", 3, 5),
    }
    assert DecodingConfig(acceptance_threshold=0.1).preset == DecodingConfig().preset


def test_models_a_method_uses() -> None:
    used = {name: (c.uses_target, c.uses_draft) for name in METHODS for c in [DecodingConfig(name)]}
    assert used.pop("target") == used.pop("mtjd") == (True, False)
    assert used.pop("draft") == (False, True)
    assert set(used.values()) == {(True, True)}
