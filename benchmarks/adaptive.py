"""Fixed shapes against shapes that follow the load, by batch size, in one run.

    python -m benchmarks.adaptive --batches 1 4 16
    python -m benchmarks.adaptive --pair I --extra-layers 30

The engine alone, prefill included: `target`, chains of `speculative`, `mmtad` at its default and `mmtad`
and `speculative` adapting, in turn at every batch size, after one round that is not counted. One policy
serves the whole run, as in a server; what it learnt at one size it knows at the next. Prints a row per
configuration; the last line of standard output is one JSON document.
"""

import argparse
import json
import platform
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.generation import generate
from benchmarks.load.processes import commit
from benchmarks.pairs import load_pair
from benchmarks.speed import spread
from benchmarks.tasks import make_task
from decoding import DecodingConfig, ModelPair, Policy, SamplingParams, default_threshold, load_costs

CHAINS = (1, 2, 4)
Row = dict[str, Any]


def configurations(*, greedy: bool) -> list[DecodingConfig]:
    """Baselines first, each at every preset that may be its best; adaptive ones last."""
    threshold = default_threshold(greedy=greedy)
    return [
        DecodingConfig("target"),
        *(DecodingConfig("speculative", depth) for depth in CHAINS),
        DecodingConfig("mmtad", acceptance_threshold=threshold),
        DecodingConfig("speculative", adaptive=True),
        DecodingConfig("mmtad", acceptance_threshold=threshold, adaptive=True),
    ]


@dataclass
class Figures:
    """Of one configuration at one batch size: a value per repeat, and the shapes of all its steps."""

    config: DecodingConfig
    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    presets: Counter[str] = field(default_factory=Counter)

    def row(self, batch: int) -> Row:
        return {
            "batch": batch,
            "method": self.config.method,
            "preset": "adaptive" if self.config.adaptive else self.config.preset.name,
            "tokens_per_s": statistics.median(self.rates),
            "spread": spread(self.rates),
            "cpu_ms_per_token": 1e3 * statistics.median(self.cpu),
            "log_prob": statistics.mean(self.log_probs),
            "shapes": dict(self.presets.most_common()) if self.config.adaptive else {},
        }


def measure(
    pair: ModelPair,
    policy: Policy,
    prompts: list[list[int]],
    params: SamplingParams,
    batch: int,
    repeats: int,
) -> list[Row]:
    """All configurations with `batch` rows decoded at once, in turn; in round 0 the policy learns."""
    figures = [Figures(config) for config in configurations(greedy=params.greedy)]
    for repeat in range(repeats + 1):
        for each in figures:
            used = prompts if repeat or each.config.adaptive else prompts[:batch]
            results, timing = generate(pair, used, params, each.config, batch, policy)
            if repeat:
                each.rates.append(timing.num_tokens / timing.seconds)
                each.cpu.append(timing.cpu_seconds / timing.num_tokens)
                each.log_probs += [value for result in results for value in result.log_probs]
                each.presets += timing.presets
    return [each.row(batch) for each in figures]


def ratios(rows: list[Row]) -> Iterator[Row]:
    """What the goals ask for: adaptive `mmtad` over the best fixed baseline, at every batch size."""
    for batch in dict.fromkeys(row["batch"] for row in rows):
        own = [row for row in rows if row["batch"] == batch]
        fixed = [row for row in own if row["preset"] != "adaptive" and row["method"] != "mmtad"]
        (adaptive,) = (row for row in own if (row["method"], row["preset"]) == ("mmtad", "adaptive"))
        best = max(fixed, key=lambda row: float(row["tokens_per_s"]))
        cheapest = min(row["cpu_ms_per_token"] for row in fixed)
        yield {
            "batch": batch,
            "best": best["preset"],
            "speed": adaptive["tokens_per_s"] / best["tokens_per_s"],
            "cpu": cheapest / adaptive["cpu_ms_per_token"],
        }


def show(row: Row) -> None:
    shapes = " ".join(f"{name.partition('-')[2]}:{count}" for name, count in row["shapes"].items())
    print(
        f"{row['batch']:>3} rows  {row['method']:<12} {row['preset']:<18} {row['tokens_per_s']:7.1f} tokens/s"
        f" (spread {row['spread']:.2f})  {row['cpu_ms_per_token']:6.1f} CPU ms/token  "
        f"log-prob {row['log_prob']:.3f}  {shapes}",
        flush=True,
    )


def run(arguments: argparse.Namespace) -> Row:
    largest = max(arguments.batches)
    loaded = load_pair(arguments.pair, extra_layers=arguments.extra_layers, max_num_seqs=largest)
    default = DecodingConfig()
    costs = load_costs(loaded.pair, largest, depth=default.num_speculative_tokens, width=default.beam_width)
    policy = Policy(costs)
    task = make_task(loaded, None, max(arguments.prompts, 2 * largest), arguments.seed)
    params = SamplingParams(
        arguments.max_tokens, arguments.temperature, top_k=10, top_p=0.9, seed=arguments.seed, ignore_eos=True
    )
    rows: list[Row] = []
    for batch in arguments.batches:
        count = max(arguments.prompts, 2 * batch)
        found = measure(loaded.pair, policy, task.prompts[:count], params, batch, arguments.repeats)
        for row in found:
            show(row)
        rows += found
    summary = list(ratios(rows))
    for row in summary:
        print(f"{row['batch']:>3} rows: {row['speed']:.3f} times {row['best']}, by CPU time {row['cpu']:.3f}")
    return {
        "pair": loaded.label,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "settings": vars(arguments),
        "costs": {
            kind: {str(size): points for size, points in sizes.items()}
            for kind, sizes in costs.passes.items()
        },
        "rows": rows,
        "ratios": summary,
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adaptive", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--pair", default="E", choices=("E", "T", "I"))
    parser.add_argument("--extra-layers", type=int, default=30, help="of pair I")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--prompts", type=int, default=4, help="per configuration, at least two per row")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> None:
    print(json.dumps(run(parse_arguments())))


if __name__ == "__main__":
    main()
