"""Fused layers compute what stock ones do, and only they are put in their place."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from decoding.fused import FusedLayer, fuse_layers
from decoding.linear import apply_float16_linear
from decoding.model import CausalModel
from decoding.probe import probe_tree
from decoding.token_tree import TokenTree
from tests.decoding.tiny import CPU

FUSED = ("llama", "mistral", "qwen2")
KEPT = ("qwen3", "gemma2", "gpt2", "phi3", "smollm3")
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def random_model(family: str, **changes: Any) -> PreTrainedModel:
    """Norms that are not 1 and biases that are not 0, as after training."""
    torch.manual_seed(0)
    settings = {**SIZES, **changes}
    if family == "gpt2":
        settings = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    elif family in ("gemma2", "qwen3"):
        settings["head_dim"] = 8
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    model.train(False)
    return model


def logits(model: PreTrainedModel, token_ids: torch.Tensor) -> torch.Tensor:
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=token_ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", [*FUSED, *KEPT])
def test_fused_or_not_a_model_says_the_same(family: str) -> None:
    model = random_model(family)
    token_ids = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(1))
    before = logits(model, token_ids)
    expected = SIZES["num_hidden_layers"] if family in FUSED else None
    num_fused = fuse_layers(model)
    if expected is not None:
        assert num_fused == expected
    error = (logits(model, token_ids) - before).abs().max() / before.abs().max()
    assert error < 2e-5


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2", "phi3"])
def test_other_layers_are_left_alone(family: str) -> None:
    assert fuse_layers(random_model(family)) == 0


def test_layer_with_the_same_parts_that_computes_another_thing_is_left_alone() -> None:
    """A layer that does not rotate looks the same from outside."""
    model: Any = random_model("llama")
    layer = model.model.layers[1]
    stock = layer.forward

    def without_positions(*args: Any, position_embeddings: Any, **kwargs: Any) -> Any:
        cosines, sines = position_embeddings
        still = torch.ones_like(cosines), torch.zeros_like(sines)
        return stock(*args, position_embeddings=still, **kwargs)

    layer.forward = without_positions
    assert fuse_layers(model) == 1
    assert [type(each) is FusedLayer for each in model.model.layers] == [True, False]


@pytest.mark.parametrize(
    "change", [{"attention_bias": True, "mlp_bias": True}, {"head_dim": 16}, {"num_key_value_heads": 4}]
)
def test_variants_of_a_layer(change: dict[str, Any]) -> None:
    model = random_model("llama", **change)
    token_ids = torch.arange(12)[None]
    before = logits(model, token_ids)
    assert fuse_layers(model) == 2
    torch.testing.assert_close(logits(model, token_ids), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("float16", [False, True])
@pytest.mark.parametrize("family", FUSED)
def test_cached_passes_equal_the_stock_model(family: str, float16: bool) -> None:
    """Prefill in chunks and token by token, against a stock forward of the unfused model."""
    stock = random_model(family)
    token_ids = torch.randint(40, (1, 15), generator=torch.Generator().manual_seed(2))
    expected = logits(stock, token_ids)[0]
    module = random_model(family)
    fuse_layers(module)
    if float16:
        apply_float16_linear(module)
    model = CausalModel(module, rows=4, max_model_len=64, vocab_size=40, device=CPU)
    probe_tree(model)
    ids = token_ids[0].tolist()
    found = [model.prefill(0, ids[:4], keep=4), model.prefill(0, ids[4:12], keep=8)]
    found += [model.prefill(0, [each]) for each in ids[12:]]
    error = (torch.cat(found) - expected).abs().max() / expected.abs().max()
    assert error < (5e-3 if float16 else 2e-5)


def test_rows_of_unlike_length_attend_apart_and_say_the_same() -> None:
    """A pass over a long row between two short ones, against stock forwards of each text."""
    changes = {"head_dim": 32, "max_position_embeddings": 1100}
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(40, (1, length), generator=generator) for length in (9, 1030, 70)]
    stock = random_model("llama", **changes)
    expected = [logits(stock, text)[0, -2:] for text in texts]
    module = random_model("llama", **changes)
    assert fuse_layers(module) == SIZES["num_hidden_layers"]
    model = CausalModel(module, rows=4, max_model_len=1040, vocab_size=40, device=CPU)
    for row, text in enumerate(texts):
        model.prefill(row, text[0, :-2].tolist())
    lengths = torch.tensor([text.shape[1] - 2 for text in texts])
    ends = torch.cat([text[:, -2:] for text in texts])
    found = model.forward(slice(0, 3), lengths, TokenTree.chain_of(ends))
    assert model.cache.pieces == ((slice(0, 1), 64), (slice(1, 2), 1088), (slice(2, 3), 128))
    for row, each in enumerate(expected):
        torch.testing.assert_close(found[row], each, rtol=1e-4, atol=1e-4)


def test_products_of_a_fused_layer_are_linear_layers() -> None:
    """So that they are held in float16 like any other."""
    model: Any = random_model("llama")
    parameters = sum(weight.numel() for weight in model.parameters())
    fuse_layers(model)
    products = [part for part in model.model.layers.modules() if type(part) is nn.Linear]
    assert len(products) == 4 * SIZES["num_hidden_layers"]
    assert sum(weight.numel() for weight in model.parameters()) == parameters
