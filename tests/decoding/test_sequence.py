"""Bounds of `SamplingParams`, and the properties a sequence derives from its tokens."""

import math
from typing import Any

import pytest

from decoding import SamplingParams
from tests.decoding.tiny import request


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", -2),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("min_tokens", -1),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.inf),
        ("logit_bias", ((3, math.inf),)),
        ("num_top_log_probs", -1),
    ],
)
def test_value_out_of_bounds_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} "):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("fields", "adjusts"),
    [
        ({}, False),
        ({"temperature": 0.5, "top_k": 3, "num_top_log_probs": 2}, False),
        ({"min_tokens": 1}, True),
        ({"presence_penalty": -0.5}, True),
        ({"frequency_penalty": 0.5}, True),
        ({"repetition_penalty": 1.5}, True),
        ({"logit_bias": ((3, 0.0),)}, True),
    ],
)
def test_only_what_changes_logits_needs_their_adjustment(fields: dict[str, Any], adjusts: bool) -> None:
    """A field forgotten here would silently do nothing."""
    assert SamplingParams(**fields).adjusts_logits is adjusts


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63)])
def test_any_int64_is_a_seed(seed: int) -> None:
    assert SamplingParams(seed=seed).seed == seed


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (9e-6, True), (1e-5, False), (1, False)])
def test_greedy_below_a_small_temperature(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


@pytest.mark.parametrize(
    ("prompt", "output", "expected"),
    [
        ([5], [], (5, 5)),
        ([5, 6], [], (5, 6)),
        ([5], [7], (5, 7)),
        ([5, 6], [7], (6, 7)),
        ([5], [7, 8], (7, 8)),
    ],
)
def test_last_tokens(prompt: list[int], output: list[int], expected: tuple[int, int]) -> None:
    """The draft's catch-up pass starts at the token before the root, wherever that lies."""
    sequence = request("a", prompt, max_tokens=4)
    sequence.output_ids += output
    assert sequence.last_tokens() == expected
    assert sequence.num_tokens == len(prompt) + len(output)
    assert sequence.num_cached == sequence.num_tokens - 1
    assert sequence.remaining == 4 - len(output)
