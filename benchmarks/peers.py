"""Compare with other programs that run the same weights: the same requests, in turn, in one run.

    python -m benchmarks.peers --sections one batch
    python -m benchmarks.peers --sections servers --peers serve serve-bfloat16
    python -m benchmarks.peers --sections servers --peers llama.cpp llama.cpp-draft llama.cpp-q4 vllm

`one`: this engine's `target`, `speculative` and `mmtad`, in fixed shapes, against transformers' `generate`,
without and with `assistant_model`, one request at a time. `batch`: against `generate_batch`. `servers`: this
server over HTTP against `transformers serve`, llama.cpp and vLLM, of which the last two get environments of
their own in the user's cache at first use. Every text has exactly --max-tokens in the first two sections, at
most that over HTTP; temperature 0. A peer that cannot run is reported with the reason. The last line of
standard output is one JSON document.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cost import measure_costs, needed_passes
from benchmarks.pairs import BenchPair, load_pair
from benchmarks.peer import in_process, over_http
from benchmarks.peer.interleave import ratios, rows, take_turns
from benchmarks.peer.servers import PEERS, Weights
from benchmarks.table import environment, finite
from benchmarks.tasks import make_task
from benchmarks.workloads import chat_ids, load_prompts
from decoding import DecodingConfig

SECTIONS = ("one", "batch", "servers")
GOALS = {"target": 1.3, "speculative": 1.2, "batch": 1.0}
MAX_MODEL_LEN = 512
SERVE_GOAL = {("transformers serve", 8): 2.0}  # by peer and concurrency
COLUMNS = {
    "name": "<36",
    "dtype": "<15",
    "group": "<13",
    "batch": ">5",
    "tokens_per_s": ">12.1f",
    "spread": ">6.2f",
    "cpu_ms_per_token": ">16.1f",
    "tokens": ">6",
    "same_tokens": ">11.2f",
    "same_texts": ">10.2f",
    "bytes_per_step": ">14",
    "repeats": ">7",
    "version": "<34",
}
Row = dict[str, Any]


def in_one_process(pair: BenchPair, arguments: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Rows and ratios of sections `one` and `batch`."""
    tokens = arguments.max_tokens
    peers = [in_process.Peer.load(pair.folders, dtype, tokens) for dtype in arguments.dtypes]
    prompts = make_task(pair, arguments.workload, max(arguments.prompts, arguments.batch), 0).prompts
    sections = {
        "one": (in_process.one_by_one(pair, peers, tokens), arguments.prompts),
        "batch": (in_process.in_batches(pair, peers, arguments.batch, tokens), arguments.batch),
    }
    found: list[Row] = []
    for section, (contestants, count) in sections.items():
        if section in arguments.sections:
            taking = list(contestants)
            turns = take_turns(taking, prompts[:count], arguments.repeats, arguments.seconds, progress)
            found += rows(taking, turns)
    return found, ratios(found, GOALS)


def over_network(pair: BenchPair, arguments: argparse.Namespace) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows of section `servers`, ratios to each peer, and what could not run."""
    # As the model's template writes them, or it would end most of its answers at once.
    prompts = load_prompts(arguments.workload or "chat", arguments.requests)
    asked = [str(pair.tokenizer.decode(chat_ids(pair.tokenizer, each.prompt))) for each in prompts]
    shared = {"max_tokens": arguments.max_tokens, "temperature": 0}
    with tempfile.TemporaryDirectory() as scratch:
        weights = Weights(*pair.folders, Path(scratch), pair.parameters)
        with over_http.running(arguments.peers, weights, shared, progress) as (entries, missing):
            missing += over_http.take_turns(
                entries, asked, arguments.concurrency, arguments.repeats, arguments.seconds, progress
            )
            found = over_http.rows(entries)
    names = {row["name"] for row in found if not row["ours"]}
    compared = [
        ratio
        for name in sorted(names)
        for ratio in ratios(
            [row for row in found if row["ours"] or row["name"] == name],
            {row["group"]: SERVE_GOAL.get((name, row["batch"])) for row in found},
        )
    ]
    return found, compared, missing


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--peers", nargs="*", choices=tuple(PEERS), default=list(PEERS), help="servers")
    dtypes = list(in_process.DTYPES)
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes, help="of transformers")
    parser.add_argument("--pair", default="E", choices=("E", "T"), help="T not for servers")
    parser.add_argument("--workload", help="default: SQL for T, chat for E")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=2, help="of section one")
    parser.add_argument("--batch", type=int, default=8, help="rows of section batch")
    parser.add_argument("--requests", type=int, default=8, help="of section servers, per turn")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=600.0, help="no round of a section begins later")
    parsed = parser.parse_args(arguments)
    if min(parsed.repeats, parsed.prompts, parsed.batch, parsed.requests, *parsed.concurrency) < 1:
        parser.error("--repeats, --prompts, --batch, --requests and --concurrency must be positive")
    if parsed.pair == "T" and "servers" in parsed.sections:
        parser.error("--pair T is for --sections one and batch")
    return parsed


def run(arguments: argparse.Namespace, show: Callable[[str], None]) -> Row:
    """Measure what `arguments` ask for; the JSON document."""
    pair = load_pair(arguments.pair, max_num_seqs=arguments.batch, max_model_len=MAX_MODEL_LEN)
    configs = [DecodingConfig(method="target"), DecodingConfig(method="speculative")]
    costs = measure_costs(pair.pair, needed_passes(configs), batch=1, context=64, rounds=5)
    described = environment(
        pair.label,
        pair.pair,
        costs,
        parameters=pair.parameters,
        step_bytes=pair.step_bytes,
        dtype="auto",
    )
    shared = {name: described[name] for name in ("pair", "device", "cores", "threads", "commit")}
    shared |= {"workload": arguments.workload or "the default", "max_tokens": arguments.max_tokens}
    document: Row = {"program": "benchmarks.peers", "settings": vars(arguments), "environment": described}
    document |= {"costs": costs.as_json(), "rows": [], "ratios": [], "missing": []}
    if {"one", "batch"} & set(arguments.sections):
        found, compared = in_one_process(pair, arguments)
        document["rows"] += found
        document["ratios"] += compared
    if "servers" in arguments.sections:
        found, compared, missing = over_network(pair, arguments)
        document["rows"] += found
        document["ratios"] += compared
        document["missing"] += missing
    document["rows"] = [{**row, **shared} for row in document["rows"]]
    show(" ".join(f"{key}={value}" for key, value in {**described, **costs.as_json()}.items()))
    show_all(document, show)
    clean: Row = finite(document)
    return clean


def show_all(document: Row, show: Callable[[str], None]) -> None:
    show("  ".join(f"{name:{spec.partition('.')[0]}}" for name, spec in COLUMNS.items()))
    for row in document["rows"]:
        show("  ".join(cell(row.get(name), spec) for name, spec in COLUMNS.items()))
    for ratio in document["ratios"]:
        line = f"{ratio['group']}: {ratio['ours']} / {ratio['theirs']} = {ratio['ratio']:.2f}"
        line += f" (by CPU time {ratio['cpu_ratio']:.2f})"
        if ratio["goal"] is not None:
            line += f", goal {ratio['goal']}: {'met' if ratio['met'] else 'MISSED'}"
        show(line)
    for row in document["missing"]:
        show(f"{row['name']} could not be measured: {row['reason']}")


def cell(value: Any, spec: str) -> str:
    plain = spec.partition(".")[0]
    return f"{'-':{plain}}" if value is None else f"{value:{spec}}"


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("benchmarks.peers: ended from outside"))
    try:
        document = run(parse_arguments(), lambda text: print(text, flush=True))
    except ValueError as error:
        sys.exit(f"benchmarks.peers: {error}")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
