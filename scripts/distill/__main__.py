"""Trains a small draft for a target on text that the target samples itself, and writes it as a checkpoint.

    scripts/distill-draft --target meta-llama/Llama-3.2-1B-Instruct --output drafts/llama --minutes 60

Half of the time at most goes to sampling, the rest to training. A run that is cut off goes on where it
was when the same command is given again; more --minutes continue a finished one. Files for --data and
--validation are .npz with `token_ids` [sequences, tokens], sampled by the target behind the opening of
its chat template, and, if they are labelled, `top_ids` and `top_log_probs` [sequences, tokens, stored].
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from transformers.utils.logging import disable_progress_bar

from decoding import ModelLoadError, prepare_embedded_pair
from scripts.distill.errors import DistillError
from scripts.distill.progress import Progress
from scripts.distill.run import distill
from scripts.distill.settings import Settings

PROGRAM = "scripts/distill-draft"
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage."""
        self.exit(2, f"{PROGRAM}: {message}; see {PROGRAM} --help\n")


def parser() -> argparse.ArgumentParser:
    """The flags; their defaults are those of `Settings`."""
    result = _Parser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--target", help="hub id, checkpoint folder or GGUF file; the embedded target by default")
    add("--output", type=Path, required=True, metavar="FOLDER", help="where the draft is written")
    add("--layers", type=int, default=2, help="layers of the draft (default 2)")
    add("--minutes", type=float, default=30.0, help="for sampling and training together (default 30)")
    add(
        "--tokens",
        type=int,
        help="sample no more than about so many (default: half of the time, or none with --data)",
    )
    add("--data", type=Path, nargs="+", default=[], metavar="FILE.npz", help="text sampled before")
    add("--validation", type=Path, metavar="FILE.npz", help="held-out text (default: a part of the text)")
    add("--output-vocabulary", type=int, metavar="N", help="cut the head to the N most frequent tokens")
    add("--seed", type=int, default=0)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    flags = vars(parser().parse_args(arguments))
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        flags["embedded"] = flags["target"] is None
        flags["target"] = flags["target"] or prepare_embedded_pair()[0]
        distill(Settings(**flags | {"data": tuple(flags["data"])}), Progress())
    except (DistillError, ModelLoadError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: stopped; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
