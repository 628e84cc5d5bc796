"""Writes a draft: an ordinary checkpoint folder, its card, and for the embedded pair the layers alone."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decoding.embedded import OUTPUT_HEAD_FILE
from scripts.distill.draft import Draft, head_of
from scripts.distill.errors import DistillError
from scripts.distill.text import Text

LAYERS_FOLDER = "layers-only"


def check_output_vocabulary(count: int, special_ids: list[int], vocab_size: int) -> None:
    """A cut head must hold more than the special ids and less than all.

    Raises:
        DistillError: `count` is outside these bounds.
    """
    if not len(special_ids) < count < vocab_size:
        raise DistillError(
            f"--output-vocabulary is {count}; give a number between {len(special_ids) + 1} (the special ids "
            f"and one more) and {vocab_size - 1}"
        )


def frequent_ids(text: Text, count: int, special_ids: list[int], vocab_size: int) -> Tensor:
    """The `special_ids` and the most frequent others, `count` ids `[outputs]` in ascending order.

    An id counts as often as it was sampled, and by its probability wherever it is stored.
    """
    weights = torch.bincount(text.token_ids.reshape(-1).long(), minlength=vocab_size).double()
    stored = text.top_log_probs.double().exp().reshape(-1)
    weights.scatter_add_(0, text.top_ids.reshape(-1).long(), stored)
    weights[special_ids] = torch.inf
    return weights.argsort(descending=True, stable=True)[:count].sort().values


def write_draft(
    draft: Draft, tokenizer: PreTrainedTokenizerBase, output_ids: Tensor | None, folder: Path
) -> None:
    """The checkpoint in float16, as `load_model_pair` reads it; the draft itself is float16 from then on.

    A cut head lies in a file of its own, which other programs do not read: to them its absence shows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_head(folder)
    # The configuration that is written names the module's own type.
    module: PreTrainedModel = nn.Module.to(draft.module, torch.float16)
    state, head = module.state_dict(), head_of(module)
    head_name = next(name for name, part in module.named_modules() if part is head) + ".weight"
    if output_ids is not None or module.config.tie_word_embeddings:
        state.pop(head_name, None)
    if output_ids is not None:
        module.config.tie_word_embeddings = False
        _write_head(folder, {"output_ids": output_ids, "lm_head.weight": head.weight[output_ids]})
    module.save_pretrained(folder, state_dict=state)
    _make_readable(folder)
    tokenizer.save_pretrained(folder)


def write_layers(draft: Draft, output_ids: Tensor | None, folder: Path, card: str) -> None:
    """What the repository ships of the embedded draft: no embedding, which is the target's."""
    layers = folder / LAYERS_FOLDER
    layers.mkdir(exist_ok=True)
    _remove_head(layers)
    trained = {name: weight.detach().half().contiguous() for name, weight in draft.trained().items()}
    _save(trained, layers / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (layers / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (layers / "README.md").write_text(card, encoding="utf-8")
    if output_ids is not None:
        _write_head(layers, {"output_ids": output_ids})


def _remove_head(folder: Path) -> None:
    """An earlier draft in the same folder may have had a cut head."""
    (folder / OUTPUT_HEAD_FILE).unlink(missing_ok=True)


def _write_head(folder: Path, tensors: dict[str, Tensor]) -> None:
    ids = {"output_ids": tensors["output_ids"].int()}
    _save(
        {name: each.detach().cpu().contiguous() for name, each in (tensors | ids).items()},
        folder / OUTPUT_HEAD_FILE,
    )


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    _make_readable(path.parent)


def _make_readable(folder: Path) -> None:
    """For everyone: safetensors writes for the owner only, and an image is built and run by two users."""
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)
