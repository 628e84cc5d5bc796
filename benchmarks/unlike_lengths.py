"""What rows of long texts cost those of short ones that share their steps.

    python -m benchmarks.unlike_lengths --rows 16 --long-rows 0 1 --long-tokens 1800

The engine alone on the embedded pair, temperature 0: all rows hold short texts, then some of them long
ones, spread over the batch. Only steps with every row count, prefill is not part of them. Prints a row
per method and mixture; the last line of standard output is one JSON document.
"""

import argparse
import json
import sys
from typing import Any

import torch

from benchmarks.load.processes import commit
from benchmarks.pairs import load_pair
from benchmarks.speed import measure_speed
from benchmarks.tasks import make_task
from decoding import DecodingConfig, SamplingParams, default_threshold

PROMPTS = 100  # whose tokens, one behind another, the texts are
Row = dict[str, Any]


def mixture(token_ids: list[int], rows: int, long_rows: int, short: int, long: int) -> list[list[int]]:
    """Prompts of `short` tokens, but `long_rows` of them, as far apart as can be, of `long`.

    Raises ValueError where `token_ids` are too few for them.
    """
    if len(token_ids) < long + rows:
        raise ValueError(f"the workload has no {rows} prompts of up to {long} tokens")
    longs = {(2 * number + 1) * rows // (2 * long_rows) for number in range(long_rows)}
    return [token_ids[row : row + (long if row in longs else short)] for row in range(rows)]


def run(arguments: argparse.Namespace) -> Row:
    loaded = load_pair("E", max_num_seqs=arguments.rows)
    token_ids = [token for prompt in make_task(loaded, None, PROMPTS, 0).prompts for token in prompt]
    configs = [
        DecodingConfig("target"),
        DecodingConfig("mmtad", 2, 2, acceptance_threshold=default_threshold(greedy=True)),
    ]
    params = SamplingParams(arguments.max_tokens, 0.0, seed=0, ignore_eos=True)
    found: list[Row] = []
    for long_rows in arguments.long_rows:
        prompts = mixture(token_ids, arguments.rows, long_rows, arguments.short_tokens, arguments.long_tokens)
        speeds = measure_speed(
            loaded.pair, prompts, params, configs, arguments.rows, arguments.repeats, lambda _: None
        )
        for config, speed in zip(configs, speeds, strict=True):
            row = {
                "method": config.method,
                "preset": config.preset.name,
                "long_rows": long_rows,
                "step_ms": 1e3 * speed.step_seconds,
                "tokens_per_s": speed.tokens_per_s,
                "spread": speed.spread,
            }
            print(
                f"{row['preset']:<12} {long_rows:>2} of {arguments.rows} rows long: {row['step_ms']:.1f} ms,"
                f" {row['tokens_per_s']:.1f} tokens/s (spread {row['spread']:.2f})",
                flush=True,
            )
            found.append(row)
    return {
        "settings": vars(arguments),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "rows": found,
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.unlike_lengths", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--rows", type=int, default=16, help="decoded at once")
    parser.add_argument("--long-rows", type=int, nargs="+", default=[0, 1], help="that hold long texts")
    parser.add_argument("--short-tokens", type=int, default=43, help="of a short prompt")
    parser.add_argument("--long-tokens", type=int, default=1800, help="of a long prompt")
    parser.add_argument("--max-tokens", type=int, default=160, help="new tokens of every row")
    parser.add_argument("--repeats", type=int, default=3)
    parsed = parser.parse_args(arguments)
    if max(parsed.long_rows) > parsed.rows:
        parser.error("--long-rows: there are not so many --rows")
    return parsed


def main() -> None:
    arguments = parse_arguments()
    try:
        print(json.dumps(run(arguments)))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
