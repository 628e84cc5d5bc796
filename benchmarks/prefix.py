"""What prefix reuse saves: the time to the first token of prompts that begin alike, with it and without.

    python -m benchmarks.prefix --shared 512 --own 16 --requests 6

Starts this project's server anew for every row. Prompts are token ids of the workload's texts: `--shared`
of them are the same in all, `--own` are a prompt's own. Requests follow one another; the first two, of
which the first one fills the cache, are not counted. Prints a row per method and one JSON object.
"""

import argparse
import itertools
import json
import statistics
from typing import Any

import httpx

from benchmarks.load.processes import commit, spawned
from benchmarks.workloads import load_prompts

NOT_COUNTED = 2
SWITCHES = {"without": [], "with": ["--enable-prefix-caching"]}


def prompts(token_ids: list[int], shared: int, own: int, count: int) -> list[list[int]]:
    """`count` prompts that are alike in their first `shared` tokens and differ in the next one.

    Raises ValueError where `token_ids` are too few for them.
    """
    ends, used = list[list[int]](), set[int]()
    for start in range(shared, len(token_ids) - own + 1, own):
        if token_ids[start] not in used and len(ends) < count:
            used.add(token_ids[start])
            ends.append(token_ids[start : start + own])
    if len(ends) < count:
        raise ValueError(f"the workload has no {count} prompts of {shared} and {own} tokens")
    return [token_ids[:shared] + end for end in ends]


def measure(client: httpx.Client, method: str, asked: list[list[int]]) -> dict[str, float]:
    """Median milliseconds to the first token, and mean cached tokens, of all but the first requests."""
    model = client.get("/v1/models").json()["data"][0]["id"]
    answers = []
    for prompt in asked:
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        response = client.post("/v1/completions", json=body | {"speculative": {"method": method}})
        answers.append(response.raise_for_status().json())
    counted = answers[NOT_COUNTED:]
    return {
        "ttft_ms": statistics.median(each["metrics"]["time_to_first_token_ms"] for each in counted),
        "cached_tokens": statistics.mean(
            each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in counted
        ),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    text = " ".join(each.prompt for each in load_prompts(arguments.workload))
    results: dict[str, Any] = {"commit": commit(), **vars(arguments)}
    for (name, switch), method in itertools.product(SWITCHES.items(), arguments.methods):
        with (
            spawned([*switch, *arguments.server_flags]) as url,
            httpx.Client(base_url=url, timeout=300) as client,
        ):
            known = client.get("/v1/models").json()["data"][0]["id"]
            token_ids = client.post("/tokenize", json={"model": known, "prompt": text}).json()["tokens"]
            asked = prompts(token_ids, arguments.shared, arguments.own, arguments.requests + NOT_COUNTED)
            found = results[f"{method} {name}"] = measure(client, method, asked)
        row = f"{method:>12} {name:>8}  TTFT p50 {found['ttft_ms']:8.1f} ms"
        print(f"{row}  cached {found['cached_tokens']:.0f} of {arguments.shared + arguments.own}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefix", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--shared", type=int, default=512, help="tokens that all prompts begin with")
    parser.add_argument("--own", type=int, default=16, help="tokens behind them")
    parser.add_argument("--requests", type=int, default=6, help="that are counted, per method")
    parser.add_argument("--methods", nargs="+", default=["target", "mmtad"])
    parser.add_argument("--workload", default="chat")
    parser.add_argument("--server-flags", nargs=argparse.REMAINDER, default=[], help="last")
    print(json.dumps(run(parser.parse_args())))


if __name__ == "__main__":
    main()
