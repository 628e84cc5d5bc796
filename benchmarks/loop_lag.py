"""How late a server's event loop runs, and how long its probes take, under streams and broken requests.

    python -m benchmarks.loop_lag --url http://127.0.0.1:8000 --seconds 60

Prints one JSON object: percentiles of `mmtad_event_loop_lag_seconds` over the run, each the upper bound of
the histogram's bucket in which it lies, how long /health, /ready and /metrics took, and what the requests
were answered.
"""

import argparse
import asyncio
import collections
import itertools
import json
import math
import random
import time
from collections.abc import Callable
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

METRIC = "mmtad_event_loop_lag_seconds"
NUM_STREAMS = 32
PER_KIND = 2  # clients of each kind of broken request
PROBES = ("/health", "/ready", "/metrics")
PROBE_PAUSE_SECONDS = 0.05
MEBIBYTE = 2**20

Bodies = Callable[[random.Random, str], bytes]
Buckets = dict[float, float]


def valid(model: str, **fields: Any) -> bytes:
    return json.dumps({"model": model, "prompt": "select", "max_tokens": 4, **fields}).encode()


def malformed(rng: random.Random, model: str) -> bytes:
    """Not JSON, or JSON that is slow or dangerous to look at."""
    return rng.choice(
        [
            b"{",
            b"",
            b"[" * 20_000,
            b'{"a":' * 5_000,
            b'{"model": "x", "prompt": "\\ud800"}',
            b'{"model": "x", "temperature": NaN}',
            b"\xff\xfe" * 100,
            valid(model, prompt=[-1] * 20_000),
            valid(model, logit_bias={str(number): 1 for number in range(5_000)}),
            valid(model, stop=["x"] * 10_000),
        ]
    )


def mutated(rng: random.Random, model: str) -> bytes:
    """A valid body with a few bytes changed, dropped or doubled."""
    body = bytearray(valid(model, temperature=0.5, stop=["a"], seed=1))
    for _ in range(rng.randrange(1, 6)):
        place = rng.randrange(len(body))
        body[place : place + rng.randrange(2)] = rng.randbytes(rng.randrange(3))
    return bytes(body)


def huge(rng: random.Random, model: str) -> bytes:
    """As large as a body may be, and a little larger."""
    envelope = len(valid(model, prompt=""))
    return valid(model, prompt="x " * ((MEBIBYTE - envelope) // 2 + rng.randrange(2)))


class Load:
    """Streams and broken requests until told to stop; counts what they were answered."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self.answers: collections.Counter[str] = collections.Counter()
        self.probes: dict[str, list[float]] = {path: [] for path in PROBES}  # seconds
        self._client = client
        self._model = model

    async def stream(self, number: int) -> None:
        for seed in itertools.count(number, NUM_STREAMS):
            body = json.loads(valid(self._model, stream=True, max_tokens=64, ignore_eos=True, seed=seed))
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if line:
                        self.answers[f"stream {response.status_code}, events"] += 1

    async def break_in(self, name: str, bodies: Bodies, seed: int) -> None:
        rng = random.Random(seed)
        while True:
            await self._send(name, bodies(rng, self._model))

    async def probe(self) -> None:
        """As Prometheus and balancers do, but more often; in a thread, which this program's own load
        does not hold up.
        """
        with httpx.Client(base_url=self._client.base_url, timeout=60) as client:
            for path in itertools.cycle(PROBES):
                self.probes[path].append(await asyncio.to_thread(seconds_of, client, path))
                await asyncio.sleep(PROBE_PAUSE_SECONDS)

    async def _send(self, name: str, body: bytes) -> None:
        headers = {"content-type": "application/json"}
        try:
            response = await self._client.post("/v1/completions", content=body, headers=headers)
            self.answers[f"{name} {response.status_code}"] += 1
        except httpx.TransportError as error:  # an answer given before the body was read ends the connection
            self.answers[f"{name} {type(error).__name__}"] += 1


def seconds_of(client: httpx.Client, path: str) -> float:
    started = time.perf_counter()
    client.get(path).raise_for_status()
    return time.perf_counter() - started


async def lag_buckets(client: httpx.AsyncClient) -> Buckets:
    """Cumulative counts by upper bound; raises ValueError where the server does not measure its lag."""
    response = await client.get("/metrics")
    samples = (
        sample
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if sample.name == f"{METRIC}_bucket"
    )
    buckets = {float(sample.labels["le"]): sample.value for sample in samples}
    if not buckets:
        raise ValueError(f"the server has no {METRIC}")
    return buckets


def buckets_between(before: Buckets, after: Buckets) -> Buckets:
    return {bound: count - before[bound] for bound, count in after.items()}


def percentile(buckets: Buckets, share: float) -> float:
    """The upper bound of the bucket that holds this share of the observations."""
    total = max(buckets.values())
    return min(bound for bound, count in buckets.items() if count >= share * total)


def quantile(values: list[float], share: float) -> float:
    """The smallest value that this share of them does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def summary(seconds: list[float]) -> dict[str, float]:
    quantiles = {
        "p50_seconds": round(quantile(seconds, 0.5), 4),
        "p99_seconds": round(quantile(seconds, 0.99), 4),
    }
    return {"count": len(seconds), **quantiles}


async def measure(url: str, seconds: float, *, broken: bool = True) -> dict[str, Any]:
    """The lag of the server at `url` under load for `seconds`; without `broken`, of streams alone."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        load = Load(client, model)
        before = await lag_buckets(client)
        work = [load.probe(), *(load.stream(number) for number in range(NUM_STREAMS))]
        for seed, bodies in enumerate([malformed, mutated, huge] * PER_KIND if broken else []):
            work.append(load.break_in(bodies.__name__, bodies, seed))
        tasks = [asyncio.ensure_future(each) for each in work]
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        after = await lag_buckets(client)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()
    during = buckets_between(before, after)
    return {
        "seconds": seconds,
        "observations": int(max(during.values())),
        "p50_seconds": percentile(during, 0.5),
        "p99_seconds": percentile(during, 0.99),
        "max_seconds": percentile(during, 1.0),
        "probes": {path: summary(seconds) for path, seconds in load.probes.items()},
        "answers": dict(sorted(load.answers.items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--streams-only", action="store_true", help="a full server without broken requests")
    arguments = parser.parse_args()
    figures = asyncio.run(measure(arguments.url, arguments.seconds, broken=not arguments.streams_only))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
