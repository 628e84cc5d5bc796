"""Float16 weights in linear layers: what is replaced, and that only the weights are rounded."""

import platform

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from decoding import linear
from decoding.linear import FLOAT16_MAX, Float16Linear, apply_float16_linear, float16_linear_available

needs_ops = pytest.mark.skipif(not float16_linear_available(), reason="no float16 linear ops on this machine")


@needs_ops
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_only_the_weights_are_rounded(kind: type[nn.Module], bias: bool) -> None:
    """Guards Conv1D's transposed weight and a lost bias."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 8, bias=bias) if kind is nn.Linear else Conv1D(8, 12)
    model, inputs = nn.Sequential(layer), torch.randn(2, 5, 12)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.half().float())
        if layer.bias is not None:
            layer.bias.normal_()
        expected = layer(inputs)
        apply_float16_linear(model)
        assert type(model[0]) is Float16Linear
        torch.testing.assert_close(model(inputs), expected, rtol=1e-5, atol=1e-5)
    assert model[0].num_bytes == 2 * 12 * 8


@needs_ops
def test_layers_that_must_stay_float32_do() -> None:
    """Weights beyond float16 would become infinite; other dtypes and subclasses have their own arithmetic."""

    class Own(nn.Linear):
        pass

    large, whole = nn.Linear(4, 4), nn.Linear(4, 4)
    with torch.no_grad():
        large.weight[0, 0] = 2 * FLOAT16_MAX
        whole.weight[0, 0] = torch.nan
    model = nn.Sequential(large, whole, nn.Linear(4, 4).double(), Own(4, 4), nn.LayerNorm(4))
    kinds = [type(child) for child in model]
    assert apply_float16_linear(model) == 0
    assert [type(child) for child in model] == kinds


@needs_ops
def test_share_counts_a_tied_weight_once_for_each_use() -> None:
    """An embedding stays float32 although the head tied to it is reduced."""
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["embedding"].weight
    assert apply_float16_linear(model) == pytest.approx(0.5)
    untied = nn.Sequential(nn.Linear(4, 10, bias=False), nn.Embedding(10, 4))
    assert apply_float16_linear(untied) == pytest.approx(0.5)
    assert apply_float16_linear(nn.Sequential(nn.Linear(4, 10, bias=False))) == pytest.approx(1)


def test_other_processors_keep_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert not float16_linear_available()


def test_missing_ops_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(weight: torch.Tensor, bias: torch.Tensor | None) -> Float16Linear:
        raise AttributeError("linear_prepack_fp16")

    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(linear, "Float16Linear", missing)
    assert not float16_linear_available()
