"""Measure the engine alone: what each decoding method is worth on one pair, as rows and one JSON document.

    python -m benchmarks.decode --pair T
    python -m benchmarks.decode --pair E --prompts 40 --max-tokens 96
    python -m benchmarks.decode --pair S --shapes llama-8b-1b --batches 1 4 16

BE is delivered tokens over target steps (for `draft`, over its own). The log-probability is the
untransformed target's, nats per token, averaged per prompt; its difference to `target` on the same prompts
comes with a paired 95 % interval; accepted_nats and own_nats are means over the tokens that were accepted
from the draft and over the target's own. Speed is that of decoding steps with every row taken, methods in
turn, median of the repeats; S, S_bound and S_free are explained in `benchmarks.cost`. CPU seconds are those
of the whole process, and a proxy for energy. Texts are judged on all prompts, steps timed on the first few.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from benchmarks import shapes
from benchmarks.baselines import beam_search, repetition
from benchmarks.cost import CostTable, measure_costs, needed_passes, speed_up
from benchmarks.exact import BLOCK, exact_mtjd
from benchmarks.generation import Generation, generate, sampling_params, score_all
from benchmarks.judge import Judge
from benchmarks.methods import configurations
from benchmarks.pairs import NAMES, BenchPair, load_pair
from benchmarks.speed import Speed, measure_speed
from benchmarks.table import describe, describe_speed, environment, finite, header, line
from benchmarks.tasks import Task, make_task
from decoding import DecodingConfig, SamplingParams, default_threshold

MAX_EXACT_VOCABULARY = 128
BEAMS = 4
MIN_GAP = 1e-3  # nats per token; shares of less are noise
ENERGY_NOTE = "cpu_ms_per_token is a proxy for energy: this machine is not asked for joules"
Row = dict[str, Any]


def baselines(
    pair: BenchPair,
    task: Task,
    params: SamplingParams,
    texts: list[Generation],
    arguments: argparse.Namespace,
) -> Iterator[tuple[Row, list[Generation]]]:
    """Rows that no method of the engine gives; `texts` are those of `target`."""
    batch, ends = arguments.batch, pair.pair.eos_token_ids
    if not params.greedy:
        greedy = replace(params, temperature=0.0)
        yield (
            {"method": "greedy"},
            generate(pair.pair, task.prompts, greedy, DecodingConfig("target"), batch)[0],
        )
    beams = beam_search(pair.folders[0], task.prompts, width=BEAMS, max_tokens=params.max_tokens, ends=ends)
    yield {"method": "beam search", "width": BEAMS}, beams
    yield {"method": "repetition"}, repetition(texts)
    if pair.pair.vocab_size <= MAX_EXACT_VOCABULARY:
        exact = exact_mtjd(pair.pair, task.prompts, params, batch)
        yield {"method": "exact mtjd", "depth": BLOCK}, exact


def quality_rows(
    pair: BenchPair,
    task: Task,
    params: SamplingParams,
    configs: list[DecodingConfig],
    arguments: argparse.Namespace,
) -> Iterator[Row]:
    """One row per configuration and baseline; all are compared with the first configuration."""
    judge = Judge(task)
    for config in configs:
        results, _ = generate(pair.pair, task.prompts, params, config, arguments.batch)
        if config.method == "draft":
            score_all(pair.pair, task.prompts, results)
        yield {**describe(config), **judge.row(results), "T": params.temperature}
    for labels, results in baselines(pair, task, params, judge.reference, arguments):
        score_all(pair.pair, task.prompts, results)
        yield {**labels, **judge.row(results), "T": params.temperature}


def add_speed(rows: list[Row], configs: list[DecodingConfig], speeds: list[Speed], costs: CostTable) -> None:
    """Put each configuration's speed into its row; rows without a configuration stand behind them."""
    plain = speeds[0]
    for row, config, speed in zip(rows, configs, speeds, strict=False):
        values = speed_up(config, costs, row["BE"], speed.step_seconds, plain.step_seconds)
        row |= {
            "tokens_per_s": speed.tokens_per_s,
            "spread": speed.spread,
            "repeats": speed.repeats,
            "step_ms": speed.step_seconds * 1e3,
            "cpu_ms_per_token": speed.cpu_seconds_per_token * 1e3,
            **describe_speed(values),
        }


def add_gap_shares(rows: list[Row]) -> None:
    """What part each row reaches of the gain in log-probability of exact joint decoding over `target`.

    Left out where exact joint decoding gains nothing that can be told from chance, or next to nothing, as
    at temperature 0.
    """
    exact = next((row for row in rows if row["method"] == "exact mtjd"), None)
    if exact is None or not exact["interval"][0] > MIN_GAP:
        return
    for row in rows:
        row["gap_share"] = row["difference"] / exact["difference"]


def measure(
    pair: BenchPair, task: Task, arguments: argparse.Namespace
) -> Iterator[tuple[list[Row], CostTable]]:
    """The rows of each temperature, and the cost table measured with them."""
    for temperature in arguments.temperatures:
        params = sampling_params(arguments, temperature)
        thresholds = arguments.thresholds or [default_threshold(greedy=params.greedy)]
        configs = list(configurations(arguments.depths, arguments.widths, thresholds))
        rows = []
        for row in quality_rows(pair, task, params, configs, arguments):
            progress(f"T {temperature}: {row['method']}, BE {row['BE']:.2f}, {row['log_prob']:.4f} nats")
            rows.append(row)
        timed = task.prompts[: arguments.timed_prompts]
        context = int(task.prompt_length + rows[0]["length"] / 2)
        costs = measure_costs(pair.pair, needed_passes(configs), batch=arguments.timed_batch, context=context)
        progress(f"T {temperature}: costs {json.dumps(costs.as_json())}")
        speeds = measure_speed(
            pair.pair, timed, params, configs, arguments.timed_batch, arguments.repeats, progress
        )
        add_speed(rows, configs, speeds, costs)
        add_gap_shares(rows)
        yield rows, costs


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--pair", default="E", choices=(*NAMES, "S"))
    parser.add_argument("--base", default="T", choices=("E", "T"), help="of pair I")
    parser.add_argument("--extra-layers", type=int, default=24, help="of pair I")
    parser.add_argument("--draft", help="folder or Hub id of another draft for the pair's target")
    shapes.add_arguments(parser)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--workload", help="default: SQL for T, chat for E")
    parser.add_argument("--prompts", type=int, help="texts that are judged; default 400 for T, 40 for E")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16, help="rows while texts are written to be judged")
    parser.add_argument("--timed-batch", type=int, default=1, help="rows while steps are timed")
    parser.add_argument("--timed-prompts", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--depths", type=int, nargs="+", default=[4])
    parser.add_argument("--widths", type=int, nargs="+", default=[4])
    parser.add_argument("--thresholds", type=float, nargs="+", help="default: the server's own")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.0])
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def load(arguments: argparse.Namespace) -> tuple[BenchPair, Task]:
    rows = max(arguments.batch, arguments.timed_batch)
    pair = load_pair(
        arguments.pair,
        base=arguments.base,
        extra_layers=arguments.extra_layers,
        draft=arguments.draft,
        dtype=arguments.dtype,
        max_num_seqs=rows,
    )
    count = arguments.prompts or (400 if pair.base == "T" else 40)
    return pair, make_task(pair, arguments.workload, count, arguments.seed)


def run(arguments: argparse.Namespace, show: Callable[[str], None]) -> dict[str, Any]:
    """Measure what `arguments` ask for; the JSON document."""
    if arguments.pair == "S":
        return shapes.run(arguments, show)
    pair, task = load(arguments)
    document: dict[str, Any] = {"settings": vars(arguments), "workload": task.name, "energy": ENERGY_NOTE}
    document |= {"costs": [], "rows": []}
    for rows, costs in measure(pair, task, arguments):
        document["environment"] = environment(
            pair.label,
            pair.pair,
            costs,
            parameters=pair.parameters,
            step_bytes=pair.step_bytes,
            dtype=arguments.dtype,
        )
        document["costs"].append(costs.as_json())
        shared = {
            **document["environment"],
            "workload": task.name,
            "prompt_length": round(task.prompt_length, 1),
            "max_tokens": arguments.max_tokens,
            "batch": arguments.timed_batch,
            "judged_batch": arguments.batch,
        }
        show(" ".join(f"{key}={value}" for key, value in {**shared, **costs.as_json()}.items()))
        show(header())
        for row in rows:
            show(line(row))
        show(ENERGY_NOTE)
        document["rows"] += [finite({**row, **shared}) for row in rows]
    return document


def main() -> None:
    try:
        document = run(parse_arguments(), lambda text: print(text, flush=True))
    except ValueError as error:
        sys.exit(f"benchmarks.decode: {error}")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
