"""One run from target to written draft."""

from dataclasses import dataclass

from decoding import load_model_pair
from scripts.distill.card import Account, target_name, write_card
from scripts.distill.draft import build_draft
from scripts.distill.evaluation import Figures, evaluate
from scripts.distill.gathering import Gatherer
from scripts.distill.output import (
    LAYERS_FOLDER,
    check_output_vocabulary,
    frequent_ids,
    write_draft,
    write_layers,
)
from scripts.distill.progress import Progress
from scripts.distill.settings import Settings
from scripts.distill.target import Target
from scripts.distill.training import Trainer

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, slots=True)
class Report:
    """Held-out figures before this run's training, where it began or went on, and of what was written."""

    start: Figures
    end: Figures


def distill(settings: Settings, progress: Progress) -> Report:
    """Make the draft, or go on with an unfinished one, and write it to `settings.output`.

    Raises:
        DistillError: the target or the data does not allow it.
        ModelLoadError: the target, or the pair in the end, cannot be loaded.
    """
    target = Target(settings.target)
    draft = build_draft(
        settings.target,
        settings.layers,
        opening=target.opening,
        vocab_size=target.vocab_size,
        device=target.device,
    )
    cut = settings.output_vocabulary
    if cut is not None:
        check_output_vocabulary(cut, target.special_ids, target.vocab_size)
    gathered = Gatherer(settings, target, progress).run()
    output_ids = None
    if cut is not None:
        output_ids = frequent_ids(gathered.training, cut, target.special_ids, target.vocab_size)

    checkpoint = settings.training_folder() / CHECKPOINT
    trainer = Trainer.of(draft, gathered.training, settings.seed, checkpoint)
    start = evaluate(draft, gathered.held_out, output_ids)
    progress.say(f"{'going on' if trainer.step else 'start'} at step {trainer.step}: {start}")
    # Where sampling overran its half, training still gets the other one.
    trainer.run(max(settings.minutes * 60 - gathered.seconds, settings.gathering_seconds), progress)
    draft.round_to_float16()
    end = evaluate(draft, gathered.held_out, output_ids)
    progress.say(f"end at step {trainer.step}: {end}")

    account = Account(gathered, trainer, end)
    write_draft(draft, target.tokenizer, output_ids, settings.output)
    (settings.output / "README.md").write_text(write_card(settings, account), encoding="utf-8")
    if settings.embedded:
        write_layers(draft, output_ids, settings.output, write_card(settings, account, layers_only=True))
        progress.say(f"layers without the embedding: {settings.output / LAYERS_FOLDER}")
    load_model_pair(settings.target, str(settings.output), max_num_seqs=1)
    progress.say(f"draft of {target_name(settings)}: {settings.output}, checked with its target")
    return Report(start, end)
