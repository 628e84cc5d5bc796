"""Time the steps of several configurations in turn, so that a busy machine slows all of them alike."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.generation import generate
from decoding import DecodingConfig, ModelPair, SamplingParams


@dataclass(frozen=True, slots=True)
class Speed:
    """Of the steps with every row taken: medians over repeats; `spread` is their range over the median."""

    tokens_per_s: float
    spread: float
    step_seconds: float
    cpu_seconds_per_token: float
    repeats: int


def measure_speed(
    pair: ModelPair,
    prompts: list[list[int]],
    params: SamplingParams,
    configs: list[DecodingConfig],
    batch: int,
    repeats: int,
    progress: Callable[[str], None],
) -> list[Speed]:
    """Every configuration once per repeat, each repeat with its own seed, after one round to warm up.

    Raises ValueError when texts are so short that no step had all rows.
    """
    rates: list[list[float]] = [[] for _ in configs]
    steps: list[list[float]] = [[] for _ in configs]
    cpu: list[list[float]] = [[] for _ in configs]
    for repeat in range(repeats + 1):
        for index, config in enumerate(configs):
            used = prompts[:batch] if repeat == 0 else prompts
            _, timing = generate(pair, used, replace(params, seed=params.seed + repeat), config, batch)
            if not timing.step_seconds:
                raise ValueError(f"{config.preset.name}: no step had all {batch} rows; use more --max-tokens")
            if repeat > 0:
                rates[index].append(sum(timing.step_tokens) / sum(timing.step_seconds))
                steps[index].append(statistics.median(timing.step_seconds))
                cpu[index].append(timing.cpu_seconds / timing.num_tokens)
        progress(f"timed {repeat}/{repeats} rounds of {len(configs)} configurations")
    return [_speed(*each) for each in zip(rates, steps, cpu, strict=True)]


def spread(values: list[float]) -> float:
    """The range of the values over their median."""
    return (max(values) - min(values)) / statistics.median(values)


def _speed(rates: list[float], steps: list[float], cpu: list[float]) -> Speed:
    return Speed(
        tokens_per_s=statistics.median(rates),
        spread=spread(rates),
        step_seconds=statistics.median(steps),
        cpu_seconds_per_token=statistics.median(cpu),
        repeats=len(rates),
    )
