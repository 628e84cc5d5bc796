"""aiperf at concurrency 8: no error, an acceptance table out of our bodies whose sums agree, and our joules.

The server replays a recorded counter and shows it under DCGM's names. aiperf takes its joules from there;
they must be those that the server says it attributed to the requests.
"""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.peer.environments import environment
from tests.external.harness import MODEL, TARGET, run, serving

NUM_REQUESTS = 120
NUM_TOKENS = 64
# aiperf scrapes three times a second and its window opens and ends between two scrapes.
MOST_RELATIVE_DIFFERENCE = 0.05
COUNTERS = (
    "mmtad_request_energy_joules_total",
    "mmtad_idle_energy_joules_total",
    "mmtad_energy_joules_total",
)


def main() -> None:
    programs = environment("aiperf", "aiperf==0.13.0")
    with tempfile.TemporaryDirectory() as folder:
        recording = Path(folder) / "counter.jsonl"
        record(recording)
        flags = ("--energy-source", f"replay:{recording}", "--metrics-compat", "vllm,dcgm")
        with serving(*flags) as url:
            before = joules(url)
            command = [programs / "aiperf", "profile", "--model", MODEL, "--url", url, "--streaming"]
            command += ["--endpoint-type", "completions", "--tokenizer", TARGET, "--use-server-token-count"]
            command += ["--concurrency", "8", "--request-count", str(NUM_REQUESTS), "--random-seed", "1"]
            command += ["--isl", "64", "--osl", str(NUM_TOKENS), "--extra-inputs", "ignore_eos:true"]
            command += [
                "--ui",
                "simple",
                "--output-artifact-dir",
                folder,
                "--gpu-telemetry",
                f"{url}/metrics",
            ]
            # A folder as tokenizer is found only where the hub may be asked; it is not.
            output = run(command, offline=False)
            used = {name: value - before[name] for name, value in joules(url).items()}
        (summary,) = Path(folder).rglob("profile_export_aiperf.json")
        check(json.loads(summary.read_text()), output)
        check_energy(json.loads(summary.read_text()), used)


def record(path: Path) -> None:
    """A minute of a counter whose power swings between 20 and 60 W, read ten times a second."""
    microjoules = 0.0
    with path.open("w", encoding="utf-8") as file:
        for number in range(601):
            line = {"seconds": number / 10, "microjoules": {"cpu:0": round(microjoules)}}
            file.write(json.dumps(line) + "\n")
            microjoules += (40 + 20 * math.sin(number / 25)) * 100_000


def joules(url: str) -> dict[str, float]:
    """The server's own counters of joules, each summed over its labels."""
    sums = dict.fromkeys(COUNTERS, 0.0)
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            if sample.name in sums:
                sums[sample.name] += sample.value
    return sums


def check(summary: dict[str, Any], output: str) -> None:
    """aiperf adds up what our bodies said of each request; its own sums must agree with each other."""
    histogram = {int(k): count for k, count in summary["pooled_spec_decode_acceptance_histogram"].items()}
    steps, accepted, drafted = (
        summary[f"total_{name}"]["avg"]
        for name in ("spec_decode_steps", "accepted_draft_tokens", "draft_tokens")
    )
    print(f"steps {steps}, accepted {accepted} of {drafted}, histogram {histogram}")
    assert summary["request_count"]["avg"] == NUM_REQUESTS
    assert summary["error_summary"] == []
    assert "Metrics: Spec Decode" in output
    assert sum(histogram.values()) == steps > 0
    assert sum(length * count for length, count in histogram.items()) == accepted <= drafted
    assert abs(summary["spec_decode_token_weighted_acceptance_length"]["avg"] - (1 + accepted / steps)) < 1e-6


def check_energy(summary: dict[str, Any], used: dict[str, float]) -> None:
    """aiperf's joules per output token against the joules that the server attributed to requests."""
    num_tokens = summary["total_output_tokens"]["avg"]
    ours = used[COUNTERS[0]] / num_tokens
    theirs = summary["nvidia_energy_per_output_token"]["avg"] / 1000
    print(f"joules per output token: aiperf {theirs:.5f}, attributed {ours:.5f}: {theirs / ours - 1:+.1%}")
    print("  " + ", ".join(f"{name} {value:.1f}" for name, value in used.items()))
    assert num_tokens == NUM_REQUESTS * NUM_TOKENS
    assert abs(theirs / ours - 1) < MOST_RELATIVE_DIFFERENCE


if __name__ == "__main__":
    main()
