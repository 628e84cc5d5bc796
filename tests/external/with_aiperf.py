"""aiperf at concurrency 8: no error, and an acceptance table out of our bodies whose sums agree."""

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.external.harness import MODEL, TARGET, environment, run, serving

NUM_REQUESTS = 40


def main() -> None:
    programs = environment("aiperf", "aiperf==0.13.0")
    with serving() as url, tempfile.TemporaryDirectory() as folder:
        command = [programs / "aiperf", "profile", "--model", MODEL, "--url", url, "--streaming"]
        command += ["--endpoint-type", "completions", "--tokenizer", TARGET, "--use-server-token-count"]
        command += ["--concurrency", "8", "--request-count", str(NUM_REQUESTS), "--random-seed", "1"]
        command += ["--isl", "64", "--osl", "16", "--extra-inputs", "ignore_eos:true"]
        command += ["--ui", "simple", "--output-artifact-dir", folder]
        # A folder as tokenizer is found only where the hub may be asked; it is not.
        output = run(command, offline=False)
        (summary,) = Path(folder).rglob("profile_export_aiperf.json")
        check(json.loads(summary.read_text()), output)


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


if __name__ == "__main__":
    main()
