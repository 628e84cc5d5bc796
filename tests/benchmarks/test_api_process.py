"""The API process under streams from workers without models: all of them end, and nothing is lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_every_token_arrives_at_the_pace_of_the_workers() -> None:
    flags = ["--streams", "4", "--workers", "2", "--seconds", "1", "--step-seconds", "0.05", "--tokens", "3"]
    command = [sys.executable, "-m", "benchmarks.api_process", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["streams"], row["failed"], row["offered_tokens_per_second"]) == (4, 0, 240)
    # From the first chunk on: one step less than all.
    assert 0 < row["tokens_per_second"] <= 240 * 20 / 19 * 1.05
    assert row["tokens_per_chunk"] >= 3
    assert 0 < row["lag_p50_seconds"] <= row["lag_p99_seconds"]
    assert row["cpu_microseconds_per_chunk"] > 0
