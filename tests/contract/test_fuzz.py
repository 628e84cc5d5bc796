"""Whatever is sent, no answer is a 5xx and every error has OpenAI's shape."""

import asyncio
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.contract.fuzz_hooks import check_openai_error
from tests.e2e.conftest import ROOT, RunningServer

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent
SECONDS = 1500.0
SEED = 20
# One seed runs out of new cases near 4,500, so the long form adds a second.
LONG_SEEDS = (SEED, 21)


def fuzz(
    server: RunningServer, report: Path, num_examples: int, seed: int
) -> subprocess.CompletedProcess[str]:
    """schemathesis over the server's own document: all phases, valid and invalid data, NUL too."""
    program = Path(sys.executable).with_name("schemathesis")
    command = [str(program), "--config-file", str(FOLDER / "schemathesis.toml"), "run"]
    command += [f"{server.url}/openapi.json", "--max-examples", str(num_examples), "--seed", str(seed)]
    command += ["--phases", "examples,coverage,fuzzing,stateful", "--mode", "all", "--continue-on-failure"]
    command += ["--report", "ndjson", "--report-ndjson-path", str(report)]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "tests.contract.fuzz_hooks", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command,
        cwd=report.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def statuses_of(event: dict[str, Any]) -> list[int]:
    """Of every exchange that one event of the report tells of."""
    recorder = event.get("ScenarioFinished", {}).get("recorder", {})
    return [each["response"]["status_code"] for each in recorder.get("interactions", {}).values()]


def test_schemathesis(server: RunningServer, tmp_path: Path, long: bool) -> None:
    statuses: list[int] = []
    for seed in LONG_SEEDS if long else (SEED,):
        report = tmp_path / f"report-{seed}.ndjson"
        run = fuzz(server, report, 200 if long else 2, seed)
        assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
        statuses += [
            status for line in report.read_text().splitlines() for status in statuses_of(json.loads(line))
        ]
    print(f"{len(statuses)} cases: {dict(sorted(Counter(statuses).items()))}")  # noqa: T201 - the figure
    assert len(statuses) >= (5000 if long else 500)
    assert max(statuses) < 500
    assert {200, 400} <= set(statuses)


STREAM = {"stream": True, "stream_options": {"include_usage": True}}
VALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"model": "tiny", "prompt": "The quick brown", "max_tokens": 4, "stop": ["x", "é"]}),
    (
        "/v1/completions",
        {"model": "tiny", "prompt": [[1, 2], [3]], "max_tokens": 2, "logit_bias": {"5": -1}},
    ),
    (
        "/v1/completions",
        {
            "model": "tiny",
            "max_tokens": 3,
            "stream": True,
            "stream_options": {"include_usage": True},
            "seed": -1,
        },
    ),
    (
        "/v1/completions",
        {"model": "tiny", "max_tokens": 2, "speculative": {"method": "mtad", "acceptance_threshold": 0.5}},
    ),
    (
        "/v1/chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "content": "\U0001f600"}], "max_tokens": 2},
    ),
    ("/tokenize", {"prompt": "text", "add_special_tokens": False}),
    ("/detokenize", {"model": "tiny", "tokens": [1, 2, 3]}),
]
NUM_MUTATIONS = 2000
AT_ONCE = 8
PIECES = (*(bytes([each]) for each in b'\0\xff"\\{}[],:-9e'), b"\\ud800", b"null", b"\xf0\x9f")


def mutated(rng: random.Random, body: bytes) -> bytes:
    """One to four bytes replaced, removed, inserted or repeated, or the rest cut off."""
    content = bytearray(body)
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(len(content) + 1)
        match rng.randrange(6):
            case 0:
                content[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                del content[place : place + rng.randrange(1, 5)]
            case 2:
                content[place:place] = rng.choice(PIECES)
            case 3:
                content[place : place + 1] = rng.choice(PIECES)
            case 4:
                content[place:place] = content[place : place + rng.randrange(1, 20)]
            case _ if rng.random() < 0.2:
                del content[place:]
    return bytes(content)


async def test_mutated_bodies(server: RunningServer) -> None:
    rng = random.Random(SEED)
    gate = asyncio.Semaphore(AT_ONCE)
    statuses: Counter[int] = Counter()
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:

        async def send(path: str, body: bytes) -> None:
            async with gate:
                headers = {"content-type": "application/json"}
                response = await client.post(path, content=body, headers=headers)
            statuses[response.status_code] += 1
            assert response.status_code < 500, (path, body)
            if response.status_code != 200:
                check_openai_error(response.content)

        valid = (rng.choice(VALID) for _ in range(NUM_MUTATIONS))
        bodies = [(path, json.dumps(body, ensure_ascii=False).encode()) for path, body in valid]
        await asyncio.gather(*(send(path, mutated(rng, body)) for path, body in bodies))
    assert statuses.total() == NUM_MUTATIONS
    assert statuses[400] > NUM_MUTATIONS / 2
    assert statuses[200] > NUM_MUTATIONS / 100
