"""Measure the engine alone: what each decoding method is worth on one pair, as rows and one JSON document.

    python -m benchmarks.decode --prompts 40 --max-tokens 96

Every row names its method and numbers. Block efficiency is delivered tokens over target steps (for
`draft`, over its own). The log-probability is the untransformed target's, nats per token, averaged per
prompt; its difference to `target` on the same prompts comes with a paired 95 % interval. CPU seconds
are those of the whole process during decoding, and a proxy for energy where no counter exists.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.workloads import WORKLOADS, chat_ids, load_prompts
from decoding import (
    DecodingConfig,
    Engine,
    ModelPair,
    SamplingParams,
    Sequence,
    load_model_pair,
    prepare_embedded_pair,
)

COLUMNS = (
    ("method", "{method:<12}"),
    ("temperature", "{temperature:>4}"),
    ("depth", "{depth:>5}"),
    ("width", "{width:>5}"),
    ("reference", "{reference:<9}"),
    ("tau", "{tau:>4}"),
    ("block_efficiency", "{block_efficiency:>16.3f}"),
    ("log_prob", "{log_prob:>8.4f}"),
    ("difference", "{difference:>10.4f}"),
    ("low", "{low:>8.4f}"),
    ("high", "{high:>8.4f}"),
    ("length", "{length:>6.1f}"),
    ("ended", "{ended:>5.2f}"),
    ("cpu_s_per_token", "{cpu_s_per_token:>15.5f}"),
)


@dataclass
class Generation:
    """What one prompt got: tokens, their log-probs, and the steps it took."""

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    num_steps: int = 0
    ended: bool = False


def configurations(depths: list[int], width: int, threshold: float) -> Iterator[DecodingConfig]:
    """All methods, the reference first; both acceptance references where a method has one."""
    yield DecodingConfig(method="target")
    yield DecodingConfig(method="draft")
    for depth in depths:
        shared = {"num_speculative_tokens": depth, "beam_width": width, "acceptance_threshold": threshold}
        yield DecodingConfig(method="speculative", num_speculative_tokens=depth)
        for reference in ("draft", "target"):
            yield DecodingConfig(method="mtad", acceptance_reference=reference, **shared)  # type: ignore[arg-type]
        for reference in ("draft", "target"):
            yield DecodingConfig(method="mmtad", acceptance_reference=reference, **shared)  # type: ignore[arg-type]


def generate(
    pair: ModelPair, prompts: list[list[int]], params: SamplingParams, config: DecodingConfig, batch: int
) -> tuple[list[Generation], float]:
    """Decode every prompt, `batch` rows at a time; returns the generations and CPU seconds."""
    engine = Engine(pair, batch)
    for index, prompt in enumerate(prompts):
        engine.add(Sequence(str(index), prompt, params, config, choice=index))
    results = [Generation() for _ in prompts]
    started = time.process_time()
    while engine.has_work():
        for output in engine.step():
            result = results[int(output.id)]
            result.token_ids += output.token_ids
            result.log_probs += output.log_probs
            result.num_steps += 1
            result.ended = output.finish_reason == "stop"
    return results, time.process_time() - started


def score(pair: ModelPair, prompt: list[int], token_ids: list[int]) -> list[float]:
    """The target's untransformed log-probabilities of `token_ids` after `prompt`, in one plain pass."""
    pair.target.cache.lengths[0] = 0
    logits = pair.target.prefill(0, prompt + token_ids[:-1], keep=len(token_ids))
    pair.target.cache.lengths[0] = 0
    chosen = torch.tensor(token_ids, device=logits.device)[:, None]
    values: list[float] = logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()
    return values


def paired_interval(values: list[float], reference: list[float]) -> tuple[float, float, float]:
    """Mean difference and its 95 % interval over prompts (normal approximation)."""
    differences = np.subtract(values, reference)
    half = 1.96 * differences.std(ddof=1) / np.sqrt(len(differences))
    mean = float(differences.mean())
    return mean, float(mean - half), float(mean + half)


def measure(
    pair: ModelPair,
    prompts: list[list[int]],
    params: SamplingParams,
    configs: list[DecodingConfig],
    batch: int,
) -> Iterator[dict[str, Any]]:
    """One row per configuration; the first is the reference of the differences."""
    reference: list[float] = []
    for config in configs:
        results, cpu_seconds = generate(pair, prompts, params, config, batch)
        if config.method == "draft":
            for prompt, result in zip(prompts, results, strict=True):
                result.log_probs = score(pair, prompt, result.token_ids)
        log_probs = [float(np.mean(result.log_probs)) for result in results]
        reference = reference or log_probs
        yield row(config, params, results, log_probs, reference, cpu_seconds)


def row(
    config: DecodingConfig,
    params: SamplingParams,
    results: list[Generation],
    log_probs: list[float],
    reference: list[float],
    cpu_seconds: float,
) -> dict[str, Any]:
    """What is printed of one configuration; a number that the method does not use is absent."""
    joint = config.method in ("mtad", "mmtad")
    _, depth, width = config.preset
    tokens = sum(len(result.token_ids) for result in results)
    difference, low, high = paired_interval(log_probs, reference)
    return {
        "method": config.method,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "depth": depth or None,
        "width": width or None,
        "reference": config.acceptance_reference if joint else None,
        "tau": config.acceptance_threshold if joint else None,
        "prompts": len(results),
        "tokens": tokens,
        "block_efficiency": tokens / sum(result.num_steps for result in results),
        "log_prob": float(np.mean(log_probs)),
        "difference": difference,
        "low": low,
        "high": high,
        "length": tokens / len(results),
        "ended": float(np.mean([result.ended for result in results])),
        "cpu_s_per_token": cpu_seconds / tokens,
    }


def show(values: dict[str, Any]) -> None:
    """Print one row of the table."""
    printed = {key: "-" if value is None else value for key, value in values.items()}
    print("  ".join(template.format(**printed) for _, template in COLUMNS), flush=True)


def environment(pair: ModelPair) -> dict[str, Any]:
    """Where the figures come from."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607 - whichever git the caller has
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "pair": pair.description,
        "device": str(pair.device),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or None,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--target", help="hub id, folder or GGUF file; default the embedded pair")
    parser.add_argument("--draft", help="the same for the draft")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--workload", default="chat", choices=WORKLOADS)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if (arguments.target is None) != (arguments.draft is None):
        parser.error("--target and --draft go together")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    models = (arguments.target, arguments.draft) if arguments.target else prepare_embedded_pair()
    pair = load_model_pair(*models, dtype=arguments.dtype, max_model_len=1024, max_num_seqs=arguments.batch)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(models[0])
    prompts = [
        chat_ids(tokenizer, each.prompt)
        for each in load_prompts(arguments.workload, arguments.prompts, arguments.seed)
    ]
    facts = environment(pair)
    print(json.dumps(facts), file=sys.stderr)
    print("  ".join(name for name, _ in COLUMNS), flush=True)
    configs = list(configurations(arguments.depths, arguments.width, arguments.threshold))
    rows = []
    for temperature in arguments.temperatures:
        params = SamplingParams(arguments.max_tokens, temperature, top_k=10, top_p=0.9, seed=arguments.seed)
        for values in measure(pair, prompts, params, configs, arguments.batch):
            rows.append(values)
            show(values)
    print(json.dumps({"environment": facts, "rows": rows}))


if __name__ == "__main__":
    main()
