"""Run the engine over many prompts, with what each got and what each step took."""

import argparse
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from decoding import (
    DecodingConfig,
    Engine,
    FinishReason,
    ModelPair,
    Policy,
    SamplingParams,
    Sequence,
)
from decoding.model import CausalModel


@dataclass
class Generation:
    """What one prompt got: tokens, their log-probs, and the steps it took.

    `accepted` and `drafted` are per step the depth that was accepted and the depth that was proposed.
    """

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    num_steps: int = 0
    ended: bool = False
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)


@dataclass
class Timing:
    """Seconds of the steps in which every row was taken, and of the whole run.

    `step_seconds` are wall seconds of one step each, `step_tokens` what it delivered in all rows,
    `step_cpu_seconds` the process's CPU seconds of those steps that ran no prompt, `cpu_seconds` those of
    the whole run for `num_tokens` tokens, prefill included, `seconds` its wall seconds. `presets` counts
    its steps by their shape.
    """

    step_seconds: list[float] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    step_cpu_seconds: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0
    num_tokens: int = 0
    seconds: float = 0.0
    presets: Counter[str] = field(default_factory=Counter)


def sampling_params(arguments: argparse.Namespace, temperature: float) -> SamplingParams:
    """As the flags of a program ask for."""
    return SamplingParams(
        arguments.max_tokens,
        temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )


def generate(
    pair: ModelPair,
    prompts: list[list[int]],
    params: SamplingParams,
    config: DecodingConfig,
    batch: int,
    policy: Policy | None = None,
) -> tuple[list[Generation], Timing]:
    """Decode every prompt, `batch` rows at a time; an adaptive `config` needs a `policy`."""
    # Prompts begin alike: their cost is counted whole.
    engine = Engine(pair, batch, prefix_caching=False, policy=policy)
    for index, prompt in enumerate(prompts):
        engine.add(Sequence(str(index), prompt, params, config, choice=index))
    results = [Generation() for _ in prompts]
    timing = Timing()
    started, began = time.process_time(), time.monotonic()
    while engine.has_work():
        tokens, before = 0, time.process_time()
        outputs = engine.step()
        cpu_seconds = time.process_time() - before
        for output in outputs:
            result = results[int(output.id)]
            result.token_ids += output.token_ids
            result.log_probs += output.log_probs
            result.num_steps += 1
            result.ended = output.finish_reason == FinishReason.STOP
            result.accepted.append(output.num_accepted_tokens)
            result.drafted.append(output.num_draft_tokens)
            tokens += len(output.token_ids)
        timing.num_tokens += tokens
        if engine.last_step.preset is not None:
            timing.presets[engine.last_step.preset] += 1
        if engine.last_step.num_sequences == batch:
            timing.step_seconds.append(engine.last_step.decode_seconds)
            timing.step_tokens.append(tokens)
            if not engine.last_step.prefill_tokens:
                timing.step_cpu_seconds.append(cpu_seconds)
    timing.cpu_seconds = time.process_time() - started
    timing.seconds = time.monotonic() - began
    return results, timing


def text_logits(model: CausalModel, token_ids: list[int], *, keep: int) -> Tensor:
    """Logits `[keep, vocab]` behind the last tokens of a text, in one plain pass over a free row."""
    model.cache.lengths[0] = 0
    logits = model.prefill(0, token_ids, keep=keep)
    model.cache.lengths[0] = 0
    return logits


def score(pair: ModelPair, prompt: list[int], token_ids: list[int]) -> list[float]:
    """The target's untransformed log-probabilities of `token_ids` after `prompt`, in one plain pass."""
    logits = text_logits(pair.target, prompt + token_ids[:-1], keep=len(token_ids))
    chosen = torch.tensor(token_ids, device=logits.device)[:, None]
    values: list[float] = logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()
    return values


def score_all(pair: ModelPair, prompts: list[list[int]], results: Iterable[Generation]) -> None:
    """Replace the log-probs of `results` by the target's own."""
    for prompt, result in zip(prompts, results, strict=True):
        result.log_probs = score(pair, prompt, result.token_ids)
