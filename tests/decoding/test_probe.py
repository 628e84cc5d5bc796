"""The tree probe: ten families of random weights are served, what would come out wrong is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from decoding import ModelLoadError, ModelPair, load_model_pair, loading
from decoding.model import CausalModel
from decoding.probe import probe_tree
from tests.decoding.checkpoints import REFUSED, SERVED, VOCAB_SIZE, random_model, save_checkpoint
from tests.decoding.tiny import causal, generate, request

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "CACHE_DIR", tmp_path / "cache")


def load(folder: str, draft: str | None = None, dtype: str = "float32") -> ModelPair:
    return load_model_pair(folder, draft, device="cpu", dtype=dtype, max_num_seqs=3)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("model_type", SERVED)
def test_family_is_served(model_type: str, dtype: str, tmp_path: Path) -> None:
    """From its files, as target and as draft; greedy speculative decoding then equals plain decoding.

    Sliding windows of 4 tokens lie well inside the 34 of the text.
    """
    folder = save_checkpoint(tmp_path / "target", model_type)
    draft = random_model(model_type, seed=1)
    draft.save_pretrained(tmp_path / "draft")
    for file in Path(folder).glob("*token*"):
        (tmp_path / "draft" / file.name).write_bytes(file.read_bytes())
    pair = load(folder, str(tmp_path / "draft"), dtype)
    assert pair.draft is not None
    assert f"({model_type}, " in pair.description
    prompt = [5, 9, 3, 40, 31, 7, 7, 12, 50, 22]
    fields = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
    texts = generate(
        pair,
        request("target", prompt, "target", **fields),
        request("speculative", prompt, "speculative", **fields),
        request("mmtad", prompt, "mmtad", acceptance_threshold=math.inf, **fields),
    )
    assert texts["speculative"].token_ids == texts["target"].token_ids
    assert texts["mmtad"].token_ids == texts["target"].token_ids


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gpt_neo", {}),
        ("gpt_neo", {"window_size": 256}),
        ("mamba", {}),
    ],
    ids=str,
)
def test_family_is_refused_by_name_in_one_line(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Local attention that no mask reaches, even where the probe's text fits the window; no attention."""
    assert model_type in REFUSED
    folder = save_checkpoint(tmp_path, model_type, **changes)
    with pytest.raises(ModelLoadError, match=f"^model type '{model_type}' cannot be served") as error:
        load(folder)
    assert "\n" not in str(error.value)


class CommitsNothing(CausalModel):
    def commit(self, rows: slice, lengths: Tensor, path: Tensor) -> None:
        pass


class SeesEverything(CausalModel):
    """Every node sees all earlier columns, its siblings too."""

    def _masks(self, inputs: Any) -> Any:
        visible = torch.arange(inputs.mask.shape[-1]) <= inputs.columns[:, :, None]
        inputs.mask.copy_(visible)
        return super()._masks(inputs)


class ForgetsPositions(CausalModel):
    """A node's position is its column."""

    def _run(self, rows: slice, inputs: Any, keep: int) -> Tensor:
        inputs.positions.copy_(inputs.columns)
        return super()._run(rows, inputs, keep)


class Breaks(CausalModel):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise IndexError("no such layer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [CommitsNothing, SeesEverything, ForgetsPositions, Breaks])
def test_planted_fault_is_found(kind: type[CausalModel], dtype: torch.dtype) -> None:
    module = random_model("llama").to(dtype)
    model = kind(module, rows=3, max_model_len=32, vocab_size=VOCAB_SIZE, device=torch.device("cpu"))
    with pytest.raises(ModelLoadError, match="model type 'llama' cannot be served with token trees"):
        probe_tree(model)


def test_weights_that_are_not_numbers_are_found() -> None:
    module = random_model("gpt2")
    with torch.no_grad():
        module.transformer.h[1].mlp.c_fc.weight[0, 0] = math.nan
    with pytest.raises(ModelLoadError, match="the tree probe is off by nan"):
        probe_tree(causal(module, vocab_size=VOCAB_SIZE))


@pytest.mark.parametrize("model_type", SERVED)
def test_rounding_of_half_precision_is_no_fault(model_type: str) -> None:
    probe_tree(causal(random_model(model_type).to(torch.bfloat16), vocab_size=VOCAB_SIZE))


@pytest.mark.parametrize("name", ["tiny-sql", "tiny-sql-draft"])
def test_trained_weights_are_served_in_half_precision(name: str) -> None:
    """Whose activations are larger than those of random ones, and their rounding with them."""
    module = LlamaForCausalLM.from_pretrained(MODELS / name, dtype=torch.bfloat16)
    assert 0 < probe_tree(causal(module, vocab_size=64)) < 0.1


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_probe_returns_its_error_and_leaves_the_rows_free(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    module = random_model("llama")
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(1 if weight.dim() == 1 else 0.3)  # as small as trained weights are
    model = causal(module.to(dtype), vocab_size=VOCAB_SIZE)
    assert 0 < probe_tree(model) <= bound
    assert not any(model.cache.lengths)
