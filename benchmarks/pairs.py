"""The pairs that are measured, by one letter each; every row of a result says which.

E, embedded: the target out of an installed package and the draft shipped here. T: the small pair trained
here (`scripts/train-tiny-pair`). I, inflated: E or T with extra target layers whose output projections
are zero, so the same function and acceptance at a chosen cost. S, shapes: random weights in the shapes
of a real pair (`benchmarks.shapes`), with synthetic acceptance.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, PreTrainedTokenizerFast

from decoding import ModelPair, load_model_pair, prepare_embedded_pair
from decoding.linear import Float16Linear
from decoding.model import CausalModel

NAMES = ("E", "T", "I")
MODELS_FOLDER = Path(__file__).parent.parent / "models"
TINY_FOLDERS = (str(MODELS_FOLDER / "tiny-sql"), str(MODELS_FOLDER / "tiny-sql-draft"))
OUTPUT_PROJECTIONS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@dataclass(frozen=True, slots=True)
class BenchPair:
    """A loaded pair with its label, the pair whose text it gives (`base`), folders and tokenizer.

    `parameters` are those of target and draft, `step_bytes` the bytes of weights that one pass of the
    target streams: its linear layers, the head among them.
    """

    label: str
    base: str
    pair: ModelPair
    folders: tuple[str, str]
    tokenizer: PreTrainedTokenizerFast
    parameters: tuple[int, int]
    step_bytes: int


def load_pair(
    name: str,
    *,
    base: str = "T",
    extra_layers: int = 24,
    draft: str | None = None,
    dtype: str = "auto",
    max_model_len: int | None = None,
    max_num_seqs: int = 16,
) -> BenchPair:
    """Load pair `name`; `base` and `extra_layers` matter for I only. `draft` is a folder or Hub id of another
    draft for the same target.

    Raises:
        ValueError: there is no such pair, or it cannot run on this machine.
    """
    if name not in NAMES:
        raise ValueError(f"no pair {name!r}; there are: {', '.join(NAMES)}")
    source = base if name == "I" else name
    label = f"I({base}+{extra_layers})" if name == "I" else name
    folders = TINY_FOLDERS if source == "T" else prepare_embedded_pair()
    if draft is not None:
        label, folders = f"{label}, draft {Path(draft).name}", (folders[0], draft)
    with _inflated(folders, extra_layers if name == "I" else 0) as (target_folder, draft_folder):
        pair = load_model_pair(
            target_folder, draft_folder, dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs
        )
    return BenchPair(
        label=label,
        base=source,
        pair=pair,
        folders=folders,
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folders[0]),
        parameters=(num_parameters(pair.target), num_parameters(pair.models["draft"])),
        step_bytes=linear_bytes(pair.target.module),
    )


@contextmanager
def _inflated(folders: tuple[str, str], extra_layers: int) -> Iterator[tuple[str, str]]:
    """The folders, the target's with `extra_layers` more layers for as long as the context lasts."""
    if extra_layers == 0:
        yield folders
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "target")
        inflate(Path(folders[0]), extra_layers, folder)
        yield str(folder), folders[1]


def inflate(source: Path, extra_layers: int, folder: Path) -> None:
    """Write the Llama checkpoint `source` with `extra_layers` copies of its last layer that add nothing.

    Raises:
        ValueError: the checkpoint has no layers with Llama's output projections.
    """
    shutil.copytree(source, folder)
    config = LlamaConfig.from_pretrained(source)
    layers = config.num_hidden_layers
    weights = load_file(source / "model.safetensors")
    last = f"model.layers.{layers - 1}."
    own = {name.removeprefix(last): weights[name] for name in weights if name.startswith(last)}
    if not own.keys() >= set(OUTPUT_PROJECTIONS):
        raise ValueError(f"{source} has no layers with {' and '.join(OUTPUT_PROJECTIONS)}")
    for layer in range(layers, layers + extra_layers):
        for name, weight in own.items():
            copied = torch.zeros_like(weight) if name in OUTPUT_PROJECTIONS else weight.clone()
            weights[f"model.layers.{layer}.{name}"] = copied
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.num_hidden_layers = layers + extra_layers
    config.save_pretrained(folder)


def linear_bytes(module: nn.Module) -> int:
    """Bytes of the weights of all linear layers."""
    total = 0
    for part in module.modules():
        if isinstance(part, nn.Linear):
            total += part.weight.numel() * part.weight.element_size()
        elif isinstance(part, Float16Linear):
            total += part.num_bytes
    return total


def num_parameters(model: CausalModel) -> int:
    """Parameters as loaded, a tied head counted once."""
    tied = bool(model.module.config.get_text_config().tie_word_embeddings)
    total = sum(weight.numel() for weight in model.module.parameters())
    for name, part in model.module.named_modules():
        if isinstance(part, Float16Linear) and not (tied and name.endswith("lm_head")):
            total += part.in_features * part.out_features
    return total
