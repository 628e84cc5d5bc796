"""The laws of decoding.md section 1 in plain Python, one token at a time."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Series
from typing import Any

import torch

from decoding import SamplingParams, Sequence
from decoding.batch import sequence_end_ids
from decoding.model import CausalModel
from tests.decoding.test_sampler import transformed
from tests.decoding.tiny import stock

Logits = Callable[[list[int]], list[float]]  # of the token after a text

# Values that float32 holds exactly, so that plain Python agrees to the last digits.
ADJUSTING: dict[str, dict[str, Any]] = {
    "bias": {"logit_bias": ((2, 1.5), (3, -2.0))},
    "repetition": {"repetition_penalty": 1.5},
    "presence and frequency": {"presence_penalty": 0.75, "frequency_penalty": -0.5},
    "min_tokens": {"min_tokens": 2},
    "all": {
        "logit_bias": ((1, 0.5), (4, -1.0)),
        "repetition_penalty": 1.25,
        "presence_penalty": 0.25,
        "frequency_penalty": 0.5,
        "min_tokens": 3,
    },
}


def adjusted(
    logits: Series[float],
    prompt: Series[int],
    output: Series[int],
    params: SamplingParams,
    ends: Iterable[int] = (),
) -> list[float]:
    """Bias, then penalties, then the minimum length, for the token behind `prompt` and `output`."""
    result = list(logits)
    for token, bias in params.logit_bias:
        result[token] += bias
    counts = Counter(output)
    for token, value in enumerate(result):
        if token in counts or token in prompt:
            factor = params.repetition_penalty
            result[token] = value / factor if value > 0 else value * factor
        result[token] -= params.frequency_penalty * counts[token]
        result[token] -= params.presence_penalty * (token in counts)
    if len(output) < params.min_tokens:
        for token in ends:
            result[token] = -math.inf
    return result


def next_law(
    logits: Logits, prompt: list[int], output: list[int], params: SamplingParams, ends: Iterable[int] = ()
) -> list[float]:
    """Log-probabilities of the next token after all transforms; at temperature 0 the log-softmax."""
    values = logits([*prompt, *output])
    return transformed(adjusted(values, prompt, output, params, ends), params)


def text_law(
    logits: Logits, prompt: list[int], params: SamplingParams, ends: frozenset[int] = frozenset()
) -> dict[tuple[int, ...], float]:
    """The exact probability of every text of single-token sampling, cut at its first end."""
    law: dict[tuple[int, ...], float] = {}

    def extend(text: tuple[int, ...], prob: float) -> None:
        if len(text) == params.max_tokens or ends.intersection(text[-1:]):
            law[text] = prob
            return
        for token, log_prob in enumerate(next_law(logits, prompt, list(text), params, ends)):
            if log_prob > -math.inf:
                extend((*text, token), prob * math.exp(log_prob))

    extend((), 1.0)
    return law


def greedy_text(logits: Logits, sequence: Sequence, eos: Series[int] = ()) -> list[int]:
    """What single-token decoding at temperature 0 writes, its adjustments included."""
    ends, text = sequence_end_ids(sequence, eos), list[int]()
    while len(text) < sequence.params.max_tokens and not ends.intersection(text[-1:]):
        law = next_law(logits, sequence.prompt_ids, text, sequence.params, ends)
        text.append(law.index(max(law)))
    return text


def likeliest_block(
    logits: Logits, sequence: Sequence, output: list[int], depth: int, eos: Series[int] = ()
) -> tuple[int, ...]:
    """The block of `depth` tokens, or shorter if it ends, of highest joint probability: exhaustive search."""
    ends = sequence_end_ids(sequence, eos)
    best = (-math.inf, ())

    def extend(block: tuple[int, ...], score: float) -> None:
        nonlocal best
        if len(block) == depth or ends.intersection(block[-1:]):
            best = max(best, (score, block))
            return
        law = next_law(logits, sequence.prompt_ids, [*output, *block], sequence.params, ends)
        for token, log_prob in enumerate(law):
            if log_prob > -math.inf:
                extend((*block, token), score + log_prob)

    extend((), 0.0)
    return best[1]


def of_model(model: CausalModel) -> Logits:
    """The logits of a model's plain forward, remembered by text: a repetition penalty knows their sign."""
    known: dict[tuple[int, ...], list[float]] = {}

    def logits(text: list[int]) -> list[float]:
        key = tuple(text)
        if key not in known:
            with torch.inference_mode():
                output = stock(model)(input_ids=torch.tensor([text]), use_cache=False)
            known[key] = output.logits[0, -1, : model.vocab_size].tolist()
        return known[key]

    return logits


def of_chain(table: Any) -> Logits:
    """A Markov chain's logits, `table` `[vocab, vocab]` of probabilities."""
    logs = table.log().tolist()
    return lambda text: logs[text[-1]]


def joint(logits: Logits, sequence: Sequence, output: list[int], block: Series[int]) -> float:
    """The log-probability of `block` behind `output` under the transformed law."""
    return sum(
        next_law(logits, sequence.prompt_ids, [*output, *block[:n]], sequence.params)[token]
        for n, token in enumerate(block)
    )
