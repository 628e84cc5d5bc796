"""Quality against speed over the numbers of `mmtad`: JSON lines, one per configuration, that can be resumed.

    python -m benchmarks.sweep --pair T --out build/sweep-T.jsonl

Lines that the file already holds are not measured again. Each configuration's texts are compared with those
of `target` on the same prompts, and its steps timed in turn with those of `target`. Baselines come first.
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
from benchmarks.generation import generate, score_all
from benchmarks.judge import Judge
from benchmarks.pairs import BenchPair
from benchmarks.references import DRAFT_REFERENCES, draft_reference
from benchmarks.speed import measure_speed
from benchmarks.table import describe, finite
from benchmarks.tasks import Task
from decoding import DecodingConfig, SamplingParams

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
WIDTHS = (1, 2, 4, 8)
DEPTHS = (2, 4, 8)
REFERENCES = ("target", *DRAFT_REFERENCES)
Row = dict[str, Any]


def grid(references: list[str]) -> Iterator[tuple[str, DecodingConfig]]:
    """Every reference with every configuration of `mmtad`, those of the least nodes first."""
    for depth, width in sorted(itertools.product(DEPTHS, WIDTHS), key=lambda each: each[0] * each[1]):
        for reference, threshold in itertools.product(references, THRESHOLDS):
            yield (
                reference,
                DecodingConfig(
                    method="mmtad",
                    num_speculative_tokens=depth,
                    beam_width=width,
                    acceptance_threshold=threshold,
                    acceptance_reference="target" if reference == "target" else "draft",
                ),
            )


def lossless() -> list[DecodingConfig]:
    """The configurations that the sweep is seen against, `target` first."""
    chains = [
        DecodingConfig(method="speculative", num_speculative_tokens=depth, acceptance="block")
        for depth in DEPTHS
    ]
    trees = [
        DecodingConfig(method="multi_candidate", candidates_per_level=(width, *(1,) * (depth - 1)))
        for depth, width in ((2, 4), (4, 4))
    ]
    return [DecodingConfig(method="target"), *chains, *trees]


def key(row: Row) -> tuple[Any, ...]:
    """What makes a line the same measurement."""
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
        self._judged(self._plain)
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

    def named(self, reference: str | None, config: DecodingConfig) -> Row:
        """What a configuration's line says before it is measured."""
        return {**describe(config), "reference": reference, **self.labels}

    def line(self, reference: str | None, config: DecodingConfig) -> Row:
        """Measure one configuration; S is its speed over that of `target` in the same rounds."""
        with draft_reference(reference if reference in DRAFT_REFERENCES else "best"):
            row = self._judged(config)
            timed = self._task.prompts[: self._arguments.timed_prompts]
            plain, own = measure_speed(
                self._pair.pair,
                timed,
                self._params,
                [self._plain, config],
                self._arguments.timed_batch,
                self._arguments.repeats,
                lambda text: None,
            )
        speed = row["BE"] * plain.step_seconds / own.step_seconds
        return {**row, **self.named(reference, config), "S": speed, "spread": own.spread}

    def baselines(self) -> Iterator[Row]:
        """Lines without speed: greedy, beam search, repetition, exact joint decoding."""
        texts = self._judge.reference
        for labels, results in decode.baselines(self._pair, self._task, self._params, texts, self._arguments):
            score_all(self._pair.pair, self._task.prompts, results)
            yield {**labels, **self._judge.row(results), **self.labels}


def measure(
    pair: BenchPair, task: Task, params: SamplingParams, arguments: argparse.Namespace, known: set[Any]
) -> Iterator[Row]:
    """The lines that are not `known` yet."""
    sweep = Sweep(pair, task, params, arguments)
    wanted: list[tuple[str | None, DecodingConfig]] = [(None, config) for config in lossless()]
    wanted += list(grid(arguments.references))
    missing = [each for each in wanted if key(sweep.named(*each)) not in known]
    if key({"method": "repetition", **sweep.labels}) not in known:
        yield from sweep.baselines()
    for number, (reference, config) in enumerate(missing, start=1):
        row = sweep.line(reference, config)
        decode.progress(
            f"{number}/{len(missing)}: T {params.temperature} {row['method']} {reference or ''} depth "
            f"{row['depth']} width {row['width']} tau {row['tau']}: BE {row['BE']:.2f}, S {row['S']:.2f}, "
            f"{row['difference']:+.4f} nats, right {row.get('right', math.nan):.3f}"
        )
        yield row


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Those of `benchmarks.decode`, and the file; some have other defaults here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", add_help=False)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--references", nargs="+", default=list(REFERENCES), choices=REFERENCES)
    own, rest = parser.parse_known_args(arguments)
    parsed = decode.parse_arguments(
        ["--pair", "T", "--prompts", "200", "--repeats", "3", "--timed-prompts", "3", *rest]
    )
    parsed.out = own.out or Path("build", f"sweep-{parsed.pair}.jsonl")
    parsed.references = own.references
    return parsed


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
            params = SamplingParams(
                arguments.max_tokens,
                temperature,
                top_k=arguments.top_k,
                top_p=arguments.top_p,
                seed=arguments.seed,
            )
            for row in measure(pair, task, params, arguments, known):
                print(json.dumps(finite(row)), file=stream, flush=True)
    print(json.dumps({"out": str(out), "lines": len(out.read_text(encoding="utf-8").splitlines())}))


if __name__ == "__main__":
    main()
