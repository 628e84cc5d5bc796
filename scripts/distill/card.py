"""The card of a draft: what it is, what it was made from, what it is worth."""

from dataclasses import dataclass
from pathlib import Path

from scripts.distill.evaluation import Figures
from scripts.distill.gathering import Gathered
from scripts.distill.settings import CARD_MARK, Settings
from scripts.distill.target import TEMPERATURES
from scripts.distill.text import STORED_TOKENS
from scripts.distill.training import (
    ACCEPTANCE_FROM,
    ACCEPTANCE_FULL,
    ACCEPTANCE_WEIGHT,
    LEARNING_RATE,
    Trainer,
)


@dataclass(frozen=True, slots=True)
class Account:
    """What a run did: its text, its training, and the figures of the draft as it is written."""

    gathered: Gathered
    trainer: Trainer
    figures: Figures


def target_name(settings: Settings) -> str:
    """How the card and the messages name the target: no folder of this machine."""
    path = Path(settings.target)
    return path.name if path.exists() else settings.target


def write_card(settings: Settings, account: Account, *, layers_only: bool = False) -> str:
    """The whole card as Markdown; `layers_only` for the form without an embedding."""
    name = target_name(settings)
    parts = [
        f"# Draft of {settings.layers} layers for {name}",
        f"A small model that proposes tokens for speculative decoding with {name}, made by `{CARD_MARK}`. "
        "It is not meant to write text on its own. It derives from the target and is under its license.",
        _files(settings, layers_only),
        "## Data\n\n" + _data(settings, account.gathered),
        "## Training\n\n" + _training(account.trainer, account.gathered),
        "## Held-out figures\n\n" + _figures(account.figures),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _files(settings: Settings, layers_only: bool) -> str:
    lines = []
    if layers_only:
        lines.append(
            "**The embedding is not in the files**: it is the target's own, also as the output head. "
            "`decoding/embedded.py` puts both together; loaded without it the draft gives nonsense."
        )
    if settings.output_vocabulary is not None:
        lines.append(
            f"**The head is cut** to {settings.output_vocabulary:,} of the token ids: "
            "`output_head.safetensors` holds them as `output_ids`, and its rows where the embedding is in "
            "the files. The draft never proposes another token. Programs that do not know the file report a "
            "missing head."
        )
    return "\n\n".join(lines)


def _data(settings: Settings, gathered: Gathered) -> str:
    training = gathered.training
    tokens = training.token_ids.shape[1]
    temperatures = " and ".join(f"{each:g}" for each in TEMPERATURES)
    lines = [
        f"{training.num_tokens:,} tokens in {len(training):,} sequences of {tokens}, after the opening of "
        "the target's chat template (or its first token, where it has none)."
    ]
    if gathered.sampled:
        lines.append(
            f"{gathered.sampled:,} tokens were sampled from the target itself for this draft, held-out "
            f"ones included: from its {STORED_TOKENS} likeliest tokens, one half each at temperature "
            f"{temperatures}, seed {settings.seed}."
        )
    if settings.data:
        lines.append("Given files: " + ", ".join(f"`{path.name}`" for path in settings.data) + ".")
    return "\n\n".join(lines)


def _training(trainer: Trainer, gathered: Gathered) -> str:
    passes = trainer.tokens / gathered.training.num_tokens
    return (
        f"{trainer.step:,} steps, {trainer.tokens:,} tokens ({passes:.1f} passes), "
        f"{trainer.seconds / 60:.1f} minutes, after {gathered.seconds / 60:.1f} minutes for the text. "
        "The layers start as the target's own, evenly spaced; embedding and head are the target's, frozen. "
        "Loss: cross-entropy to the target's stored probabilities with one more bucket for all mass outside "
        f"them; from {ACCEPTANCE_FROM:.0%} to {ACCEPTANCE_FULL:.0%} of the time the sum of min(p, q) is "
        f"mixed in, up to a weight of {ACCEPTANCE_WEIGHT:g}. AdamW, rate {LEARNING_RATE:g}, cosine."
    )


def _figures(figures: Figures) -> str:
    return (
        f"{figures.positions:,} positions that were not trained on, full vocabulary, temperature 1, measured "
        "with the float16 values of this file.\n\n"
        "| Measure | Value |\n|---|---|\n"
        f"| Mean sum of min(p, q) over the target's stored tokens (at most {figures.ceiling:.3f}) "
        f"| {figures.acceptance:.3f} |\n"
        f"| Draft's likeliest token is the target's likeliest | {figures.top_1:.3f} |\n"
        f"| Target's likeliest token is among the draft's four likeliest | {figures.top_4:.3f} |"
    )
