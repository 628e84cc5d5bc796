"""LiteLLM by two of its providers: text, streams, own fields, errors as its exceptions."""

from benchmarks.peer.environments import environment
from tests.external.harness import INSIDE, MODEL, run, serving


def main() -> None:
    programs = environment("litellm", "litellm==1.110.2")
    with serving() as url:
        run([programs / "python", INSIDE / "litellm_calls.py", url, MODEL])


if __name__ == "__main__":
    main()
