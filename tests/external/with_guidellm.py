"""guidellm with Poisson arrivals: every request is answered, none with an error."""

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peer.environments import environment
from tests.external.harness import MODEL, TARGET, run, serving

NUM_REQUESTS = 20


def main() -> None:
    programs = environment("guidellm", "torch==2.13.0", "guidellm==0.8.1")
    with serving() as url, tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [programs / "guidellm", "run", "--disable-progress"]
        command += [
            "--backend",
            f"kind=openai_http,target={url},model={MODEL},request_format=/v1/completions",
        ]
        command += [
            "--profile",
            "kind=poisson,rate=2",
            "--constraint",
            f"kind=max_requests,count={NUM_REQUESTS}",
        ]
        command += ["--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16"]
        command += ["--tokenizer", f"kind=hf_auto,model={TARGET}"]
        command += ["--output", "kind=console", "--output", f"kind=json,path={report}"]
        run(command)
        check(json.loads(report.read_text()))


def check(report: dict[str, Any]) -> None:
    (benchmark,) = report["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    print(f"requests: {totals}")
    assert totals["errored"] == 0
    assert totals["successful"] == NUM_REQUESTS


if __name__ == "__main__":
    main()
