"""lm-eval's `local-completions`: its log-likelihoods are those of a plain transformers forward."""

import tempfile

from benchmarks.peer.environments import environment
from tests.external.harness import INSIDE, MODEL, TARGET, run, serving


def main() -> None:
    programs = environment("lm-eval", "torch==2.13.0", "lm-eval[api]==0.4.13", "transformers==5.24.0")
    with serving("--dtype", "float32") as url, tempfile.TemporaryDirectory() as work:
        run([programs / "python", INSIDE / "lm_eval_task.py", url, MODEL, TARGET, work])


if __name__ == "__main__":
    main()
