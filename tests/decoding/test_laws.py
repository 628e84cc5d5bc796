"""The law of whole texts: three tokens through the engine against exact p, under every transform."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from decoding import DecodingConfig, ModelPair, SamplingParams, Sequence
from decoding.batch import Batch
from decoding.methods import METHODS_BY_NAME
from decoding.model import CausalModel
from tests.decoding.laws import ADJUSTING, of_chain, text_law
from tests.decoding.tiny import (
    CPU,
    LOSSLESS,
    Scripted,
    chi_square,
    generate,
    random_markov,
    request,
    scripted_pair,
)

EOS, ROOT, TEXTS, AT_ONCE = 0, 1, 2000, 40
TARGET, DRAFT = random_markov(5, 11, zeros=1), random_markov(5, 12, zeros=1)
TRANSFORMS: dict[str, dict[str, Any]] = {
    "none": {},
    "temperature and top-k": {"temperature": 2.0, "top_k": 3},
    "top-p": {"temperature": 0.5, "top_p": 0.75},
    "min-p": {"min_p": 0.25, "top_k": 4},
    **ADJUSTING,
    "everything": ADJUSTING["all"] | {"temperature": 1.5, "top_k": 4, "top_p": 0.875, "min_p": 0.0625},
}


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return scripted_pair(TARGET, DRAFT, eos=(EOS,), rows=AT_ONCE + 1)


def sampled(pair: ModelPair, method: dict[str, Any], fields: dict[str, Any]) -> Counter[tuple[int, ...]]:
    """How often each text of up to three tokens came, gamma 2, one frozen seed each."""
    counts: Counter[tuple[int, ...]] = Counter()
    settings = {"num_speculative_tokens": 2, "max_tokens": 3, **method, **fields}
    for start in range(0, TEXTS, AT_ONCE):
        sequences = [
            request(str(seed), [ROOT], seed=seed, **settings) for seed in range(start, start + AT_ONCE)
        ]
        counts.update(tuple(text.token_ids) for text in generate(pair, *sequences).values())
    return counts


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    f"{method}: {name}": (LOSSLESS[method], TRANSFORMS[name]) for method in LOSSLESS for name in TRANSFORMS
}
for _name in ("none", "everything"):
    CASES[f"target: {_name}"] = ({"method": "target"}, TRANSFORMS[_name])
    CASES[f"mtjd W 1: {_name}"] = ({"method": "mtjd", "beam_width": 1}, TRANSFORMS[_name])


@pytest.mark.parametrize(("method", "fields"), CASES.values(), ids=CASES)
def test_proof_03_three_tokens_follow_p(
    method: dict[str, Any], fields: dict[str, Any], pair: ModelPair
) -> None:
    """2,000 texts with EOS among the tokens; cells of expectation under 5 are merged.

    `target` and `mtjd` with W = 1 (proof 9) have the same law. Each case would fail for 1 in 10,000
    sets of seeds, any of them for 4 in 1,000; the seeds are frozen.
    """
    law = text_law(of_chain(TARGET), [ROOT], SamplingParams(max_tokens=3, **fields), frozenset({EOS}))
    assert chi_square(sampled(pair, method, fields), law) > 1e-4


def test_wrong_law_would_be_noticed(pair: ModelPair) -> None:
    """The draft's texts fail the same test by far, so it has the power to reject."""
    law = text_law(of_chain(0.9 * TARGET + 0.1 * DRAFT), [ROOT], SamplingParams(max_tokens=3))
    counts = sampled(pair, {"method": "target"}, {"ignore_eos": True})
    assert chi_square(counts, law) < 1e-6


@pytest.mark.parametrize("fields", [{}, ADJUSTING["all"]], ids=["none", "all"])
@pytest.mark.parametrize("method", LOSSLESS.values(), ids=LOSSLESS)
def test_proof_10_reduced_draft_vocabulary_stays_lossless(
    method: dict[str, Any], fields: dict[str, Any]
) -> None:
    """A draft that knows three tokens of five, out of order; false failures 1 in 10,000 sets of seeds.

    Guards an id map that is not applied to ratios or residuals, and q that is not 0 outside.
    """
    output_ids = torch.tensor([3, EOS, 1])
    table = DRAFT[:, output_ids].log()
    settings: dict[str, Any] = {"rows": AT_ONCE + 1, "vocab_size": 5, "max_model_len": 96, "device": CPU}
    cut = Scripted(lambda token_ids, positions: table[token_ids])
    draft = CausalModel(cut, output_ids=output_ids, **settings)  # type: ignore[arg-type]
    pair = replace(scripted_pair(TARGET, DRAFT, eos=(EOS,), rows=AT_ONCE + 1), draft=draft)
    law = text_law(of_chain(TARGET), [ROOT], SamplingParams(max_tokens=3, **fields), frozenset({EOS}))
    assert chi_square(sampled(pair, method, fields), law) > 1e-4


SWITCHING = [
    DecodingConfig("speculative", 2),
    DecodingConfig("speculative", 1, acceptance="block"),
    DecodingConfig("multi_candidate", candidates_per_level=(2, 2)),
    DecodingConfig("multi_candidate", candidates_per_level=(3,), replacement=True),
    DecodingConfig("target"),
]


def one_step(pair: ModelPair, sequences: list[Sequence]) -> list[int]:
    """One step for sequences of equal presets; what each accepted."""
    for model in pair.models.values():
        model.cache.lengths[: len(sequences)] = [each.num_cached for each in sequences]
    batch = Batch.of(sequences, slice(0, len(sequences)), (EOS,), 5, CPU)
    with torch.inference_mode():
        step = METHODS_BY_NAME[batch.preset.method].step(pair, batch)
    for sequence, tokens, count in zip(
        sequences, step.token_ids.tolist(), step.num_tokens.tolist(), strict=True
    ):
        kept = tokens[:count]
        kept = kept[: kept.index(EOS) + 1] if EOS in kept else kept
        sequence.output_ids += kept
        sequence.num_steps += 1
    return step.num_accepted.tolist()


@pytest.mark.parametrize("fields", [{}, ADJUSTING["all"]], ids=["none", "all"])
def test_proof_03_presets_switched_from_past_acceptance(fields: dict[str, Any], pair: ModelPair) -> None:
    """The next shape hangs on what was accepted and on the tokens: still p, since draws are fresh.

    The engine keeps a sequence's preset for its life, so steps are taken one by one here; the caches
    do not matter to Markov chains. False failures: 1 in 10,000 sets of seeds.
    """
    params = [SamplingParams(max_tokens=4, seed=seed, **fields) for seed in range(4000)]
    texts = [Sequence(str(n), [ROOT], each, SWITCHING[n % 3]) for n, each in enumerate(params)]
    running = texts
    while running:
        groups = [[each for each in running if each.config is config] for config in SWITCHING]
        for group in groups:
            for start in range(0, len(group), AT_ONCE):
                part = group[start : start + AT_ONCE]
                for sequence, accepted in zip(part, one_step(pair, part), strict=True):
                    chosen = (accepted + 2 * sequence.output_ids[-1]) % len(SWITCHING)
                    sequence.config = SWITCHING[chosen]
        running = [each for each in running if each.remaining > 0 and each.output_ids[-1] != EOS]
    law = text_law(of_chain(TARGET), [ROOT], SamplingParams(max_tokens=4, **fields), frozenset({EOS}))
    assert chi_square(Counter(tuple(each.output_ids) for each in texts), law) > 1e-4
