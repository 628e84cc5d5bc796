"""Quality against speed over the numbers of `mmtad`: JSON lines, one per configuration, that can be resumed.

    python -m benchmarks.sweep --pair T --no-timed
    python -m benchmarks.sweep --pair T --thresholds 0.3 0.9 --references target

Lines that the file already holds are not measured again. Each configuration's texts are compared with those
of `target` on the same prompts; baselines come first. Last, the steps of each shape (depth and width) are
timed in turn with those of `target`: what a step costs does not depend on reference and threshold, so these
lines (`"timed": true`) hold for every line of their shape. They want a quiet machine; `--no-timed` leaves
them to a later run over the same file.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import decode
from benchmarks.generation import generate, sampling_params, score_all
from benchmarks.judge import Judge
from benchmarks.pairs import BenchPair
from benchmarks.speed import measure_speed
from benchmarks.table import describe, finite
from benchmarks.tasks import Task
from decoding import DecodingConfig, SamplingParams

THRESHOLDS = ("0.1", "0.3", "0.5", "0.7", "0.9")
WIDTHS = ("1", "2", "4", "8")
DEPTHS = ("2", "4", "8")
REFERENCES = ("target", "draft")
Row = dict[str, Any]


def grid(arguments: argparse.Namespace) -> Iterator[DecodingConfig]:
    """Every configuration of `mmtad`, those of the least nodes first."""
    shapes = itertools.product(arguments.depths, arguments.widths)
    for depth, width in sorted(shapes, key=lambda each: each[0] * each[1]):
        for reference, threshold in itertools.product(arguments.references, arguments.thresholds):
            yield DecodingConfig(
                method="mmtad",
                num_speculative_tokens=depth,
                beam_width=width,
                acceptance_threshold=threshold,
                acceptance_reference=reference,
            )


def lossless(depths: list[int]) -> list[DecodingConfig]:
    """The configurations that the sweep is seen against, `target` first."""
    chains = [
        DecodingConfig(method="speculative", num_speculative_tokens=depth, acceptance="block")
        for depth in depths
    ]
    trees = [
        DecodingConfig(method="multi_candidate", candidates_per_level=(4, *(1,) * (depth - 1)))
        for depth in depths
    ]
    return [DecodingConfig(method="target"), *chains, *trees]


def key(row: Row) -> tuple[Any, ...]:
    """What makes a line the same measurement; a timed line does not say how many texts were judged."""
    if row.get("timed"):
        names: tuple[str, ...] = ("pair", "T", "method", "depth", "width", "timed_batch", "timed")
    else:
        names = ("pair", "T", "method", "reference", "depth", "width", "tau", "prompts", "seed")
    return tuple(row.get(name) for name in names)


class Sweep:
    """One temperature's sweep: what is judged and timed against `target`."""

    def __init__(
        self, pair: BenchPair, task: Task, params: SamplingParams, arguments: argparse.Namespace
    ) -> None:
        self._pair, self._task, self._params, self._arguments = pair, task, params, arguments
        self._judge = Judge(task)
        self._plain = DecodingConfig(method="target")
        self.labels = {
            "pair": pair.label,
            "T": params.temperature,
            "prompts": len(task.prompts),
            "seed": params.seed,
        }

    def _judged(self, config: DecodingConfig) -> Row:
        results, _ = generate(
            self._pair.pair, self._task.prompts, self._params, config, self._arguments.batch
        )
        return {**describe(config), **self._judge.row(results)}

    def begin(self) -> None:
        """Write the texts of `target`, which all others are compared with."""
        self._judged(self._plain)

    def named(self, config: DecodingConfig) -> Row:
        """What a configuration's line says before it is measured."""
        return {**describe(config), **self.labels}

    def named_timing(self, config: DecodingConfig) -> Row:
        """What the line of a shape's step says before it is measured."""
        shape = {name: value for name, value in describe(config).items() if name not in ("reference", "tau")}
        return {**shape, **self.labels, "timed": True, "timed_batch": self._arguments.timed_batch}

    def line(self, config: DecodingConfig) -> Row:
        """The quality and block efficiency of one configuration."""
        return {**self._judged(config), **self.labels}

    def timing(self, config: DecodingConfig) -> Row:
        """What a step costs, in steps of `target` that were timed in the same rounds."""
        plain, own = measure_speed(
            self._pair.pair,
            self._task.prompts[: self._arguments.timed_prompts],
            self._params,
            [self._plain, config],
            self._arguments.timed_batch,
            self._arguments.repeats,
            lambda text: None,
        )
        cost = own.step_seconds / plain.step_seconds
        return {**self.named_timing(config), "step_cost": cost, "spread": own.spread}

    def baselines(self) -> Iterator[Row]:
        """Greedy, beam search, repetition, exact joint decoding."""
        texts = self._judge.reference
        for labels, results in decode.baselines(self._pair, self._task, self._params, texts, self._arguments):
            score_all(self._pair.pair, self._task.prompts, results)
            yield {**labels, **self._judge.row(results), **self.labels}


def judge(sweep: Sweep, arguments: argparse.Namespace, known: set[Any]) -> Iterator[Row]:
    """The judged lines that are not `known` yet."""
    wanted = [*lossless(arguments.depths), *grid(arguments)]
    missing = [config for config in wanted if key(sweep.named(config)) not in known]
    has_baselines = key({"method": "repetition", **sweep.labels}) in known
    if missing or not has_baselines:
        sweep.begin()
    if not has_baselines:
        yield from sweep.baselines()
    for number, config in enumerate(missing, start=1):
        row = sweep.line(config)
        decode.progress(
            f"{number}/{len(missing)}: T {row['T']} {row['method']} {row['reference'] or ''} "
            f"depth {row['depth']} width {row['width']} tau {row['tau']}: BE {row['BE']:.2f}, "
            f"{row['difference']:+.4f} nats, right {row.get('right', math.nan):.3f}"
        )
        yield row


def time_shapes(sweep: Sweep, arguments: argparse.Namespace, known: set[Any]) -> Iterator[Row]:
    """The timed lines that are not `known` yet, one per shape."""
    configs = [*lossless(arguments.depths), *grid(arguments)]
    shapes = {key(sweep.named_timing(config)): config for config in configs}
    missing = [config for name, config in shapes.items() if name not in known]
    for number, config in enumerate(missing, start=1):
        row = sweep.timing(config)
        decode.progress(
            f"{number}/{len(missing)}: T {row['T']} {row['method']} depth {row['depth']} "
            f"width {row['width']}: a step costs {row['step_cost']:.2f} of target's"
        )
        yield row


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Those of `benchmarks.decode`, and the file; some have other defaults here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", add_help=False)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--references", nargs="+", default=list(REFERENCES), choices=REFERENCES)
    parser.add_argument("--timed", action=argparse.BooleanOptionalAction, default=True)
    own, rest = parser.parse_known_args(arguments)
    lists = ["--depths", *DEPTHS, "--widths", *WIDTHS, "--thresholds", *THRESHOLDS]
    counts = ["--prompts", "200", "--repeats", "3", "--timed-prompts", "3"]
    parsed = decode.parse_arguments(["--pair", "T", *lists, *counts, *rest])
    parsed.out = own.out or Path("build", f"sweep-{parsed.pair}.jsonl")
    parsed.references, parsed.timed = own.references, own.timed
    return parsed


def measure(
    pair: BenchPair, task: Task, arguments: argparse.Namespace, temperature: float, known: set[Any]
) -> Iterator[Row]:
    """What the file lacks at one temperature."""
    params = sampling_params(arguments, temperature)
    sweep = Sweep(pair, task, params, arguments)
    yield from judge(sweep, arguments, known)
    if arguments.timed:
        yield from time_shapes(sweep, arguments, known)


def main() -> None:
    arguments = parse_arguments()
    out: Path = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    known = {key(json.loads(text)) for text in lines}
    pair, task = decode.load(arguments)
    print(f"{out} holds {len(known)} lines", file=sys.stderr)
    with out.open("a", encoding="utf-8") as stream:
        for temperature in arguments.temperatures:
            for row in measure(pair, task, arguments, temperature, known):
                print(json.dumps(finite(row)), file=stream, flush=True)
    print(json.dumps({"out": str(out), "lines": len(out.read_text(encoding="utf-8").splitlines())}))


if __name__ == "__main__":
    main()
