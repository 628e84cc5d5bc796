"""Load test of this server, or of any other that speaks OpenAI's completions, over HTTP.

    python -m benchmarks.serve --spawn
    python -m benchmarks.serve --url http://127.0.0.1:8000 --methods target mmtad --concurrency 1 8
    python -m benchmarks.serve --compare before.json after.json

Closed loop: so many clients, each with one request at a time. Open loop: Poisson arrivals at shares of the
highest rate of requests that the closed loop reached with the same method. Methods take turns at every
load, and the first requests of each are discarded. The last line of standard output is one JSON document.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.load.client import Endpoint
from benchmarks.load.compare import compare
from benchmarks.load.plan import DISCARDED, SERVER, LoadTest, total_requests
from benchmarks.load.processes import CpuClock, commit, spawned
from benchmarks.load.report import columns, report, write_load_plots
from benchmarks.load.summary import Objective
from benchmarks.workloads import load_prompts

METHODS = ("target", "speculative", "mtad", "mmtad")


async def measure(arguments: argparse.Namespace, url: str) -> dict[str, Any]:
    """The JSON document; raises ValueError when the server cannot be tested as asked."""
    headers = {"authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=arguments.timeout, limits=limits
    ) as http:
        models = await listed_models(http)
        model = arguments.model or models[0]["id"]
        ours = {each.get("role") for each in models} & {"target", "draft"}
        methods = arguments.methods or (
            [SERVER] if not ours else list(METHODS if "draft" in ours else METHODS[:1])
        )
        fields = {"model": model, "max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
        fields |= {"ignore_eos": True} if arguments.ignore_eos else {}
        fields |= {"speculative": arguments.speculative} if arguments.speculative else {}
        clock = CpuClock.of(url)
        described = {**conditions(arguments, url, model, clock), "complete": False}
        prompts = [each.prompt for each in load_prompts(arguments.workload, seed=arguments.seed)]
        shown = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[tokens]} tokens"),
            TimeRemainingColumn(),
        )
        with Progress(*shown, console=Console(stderr=True)) as progress:
            bar = progress.add_task("warm-up", total=total_requests(arguments, len(methods)), tokens=0)
            test = LoadTest(Endpoint(http, fields), methods, prompts, arguments, clock, progress, bar)
            await test.warm_up()
            try:
                await test.run()
                described["complete"] = True
            except asyncio.CancelledError:
                # Ctrl+C: what was measured by then is still told, whatever else is pressed.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not test.runs:
        raise ValueError("interrupted before anything was measured")
    objective = Objective(arguments.slo_ttft, arguments.slo_tpot)
    return {
        "program": "benchmarks.serve",
        "conditions": described,
        "objective": {"ttft": objective.ttft, "tpot": objective.tpot},
        "points": list(test.points(objective)),
    }


async def listed_models(http: httpx.AsyncClient) -> list[dict[str, Any]]:
    try:
        response = await http.get("/v1/models")
        models: list[dict[str, Any]] = response.raise_for_status().json()["data"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise ValueError(f"{http.base_url} does not list its models: {error}") from error
    if not models:
        raise ValueError(f"{http.base_url} serves no model")
    return models


def conditions(arguments: argparse.Namespace, url: str, model: str, clock: CpuClock | None) -> dict[str, Any]:
    """What a reader must know to judge the figures, or to make them again."""
    names = (
        "workload",
        "max_tokens",
        "temperature",
        "ignore_eos",
        "requests",
        "repeats",
        "seed",
        "speculative",
    )
    return {
        "server": "started for this test" if arguments.spawn else url,
        "model": model,
        **{name: getattr(arguments, name) for name in names},
        "discarded": f"the first {DISCARDED} requests of each method",
        "cores": len(os.sched_getaffinity(0)),
        "server_cores": clock.cores() if clock else None,
        "machine": platform.machine(),
        "load_average": round(os.getloadavg()[0], 1),
        "commit": commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve", description=(__doc__ or "").splitlines()[0]
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="an OpenAI-compatible server, without /v1")
    where.add_argument("--spawn", action="store_true", help="start this project's server on a free port")
    where.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="B as multiples of A"
    )
    parser.add_argument("--server-flags", nargs=argparse.REMAINDER, default=[], help="last: for --spawn")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--api-key")
    parser.add_argument(
        "--methods",
        nargs="+",
        help=f"mmtad, or mmtad-4x4 for fixed depth and width; for this server: {' '.join(METHODS)}",
    )
    parser.add_argument("--speculative", type=json.loads, help='more of the field, as {"beam_width": 2}')
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rates", type=float, nargs="*", default=[0.3, 0.7, 1.0], help="shares of capacity")
    parser.add_argument("--requests", type=int, default=32, help="per point, at least four per client")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--workload", default="chat")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--slo-ttft", type=float, default=1.0, help="seconds to the first token")
    parser.add_argument("--slo-tpot", type=float, default=0.2, help="seconds per token after it")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds without a byte")
    parser.add_argument("--seed", type=int, default=0, help="order of the prompts")
    parser.add_argument("--json", type=Path, help="write the document here, too")
    parser.add_argument("--report", type=Path, help="write an HTML report")
    parser.add_argument("--plot", type=Path, help="write the plots by concurrency as an image (.png, .svg)")
    parsed = parser.parse_args(arguments)
    if min([*parsed.concurrency, parsed.requests, parsed.repeats]) < 1 or any(
        rate <= 0 for rate in parsed.rates
    ):
        parser.error("--concurrency, --requests, --repeats and --rates must be positive")
    return parsed


def show_table(rows: list[dict[str, str]]) -> None:
    widths = {name: max(len(name), *(len(row.get(name, "-")) for row in rows)) for name in rows[0]}
    print("  ".join(f"{name:>{width}}" for name, width in widths.items()))
    for row in rows:
        print("  ".join(f"{row.get(name, '-'):>{width}}" for name, width in widths.items()), flush=True)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.compare:
        first, second = (json.loads(path.read_text(encoding="utf-8")) for path in arguments.compare)
        ratios = compare(first, second)
        names = dict.fromkeys(name for row in ratios["ratios"] for name in row)
        show_table(
            [
                {n: f"{row[n]:.3f}" if isinstance(row.get(n), float) else row.get(n, "-") for n in names}
                for row in ratios["ratios"]
            ]
        )
        return ratios
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(spawned(arguments.server_flags)) if arguments.spawn else arguments.url
        result = asyncio.run(measure(arguments, url.rstrip("/")))
    show_table([columns(point) for point in result["points"]])
    if arguments.report:
        arguments.report.write_text(report(result), encoding="utf-8")
    if arguments.plot:
        write_load_plots(result["points"], arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(result), encoding="utf-8")
    return result


def main() -> None:
    try:
        result = run(parse_arguments())
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.serve: {error}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
