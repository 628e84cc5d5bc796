"""The same engine on CUDA: needs torch, transformers, safetensors and random weights, nothing else."""

import random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoding import Engine, ModelPair
from decoding.methods import METHODS_BY_NAME
from decoding.model import CausalModel
from decoding.probe import MAX_RELATIVE_ERROR, MAX_RELATIVE_ERROR_HALF, probe_tree
from tests.decoding.tiny import METHODS, Text, drain, make_pair, perturbed, request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]
VOCAB = 64


def small_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    torch.backends.cuda.matmul.allow_tf32 = False
    target = small_llama()
    settings: dict[str, Any] = {"vocab_size": VOCAB, "rows": 9, "max_model_len": 256}
    return make_pair(target, perturbed(target, 0.05), device=torch.device("cuda"), **settings)


@pytest.mark.parametrize(
    "fields", [{"temperature": 0}, {"temperature": 0.9, "top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str
)
@pytest.mark.parametrize("method", METHODS)
def test_text_is_the_same_alone_and_in_a_batch(method: str, fields: dict[str, Any], pair: ModelPair) -> None:
    """Float32, up to rounding that flips a decision: the first 24 tokens of 8 requests, 7 of 8 equal."""
    rng = random.Random(1)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 90))] for _ in range(8)]

    def run(*numbers: int) -> dict[str, Text]:
        engine = Engine(pair, 8, prefill_chunk=32)
        for n in numbers:
            engine.add(request(str(n), prompts[n], method, max_tokens=24, seed=n, ignore_eos=True, **fields))
        return drain(engine, check=True)

    together = run(*range(8))
    equal = sum(run(n)[str(n)].token_ids == together[str(n)].token_ids for n in range(8))
    assert equal >= 7


def test_greedy_speculative_equals_target(pair: ModelPair) -> None:
    engine = Engine(pair, 8)
    for method in ("target", "speculative"):
        for n in range(4):
            engine.add(
                request(f"{method} {n}", [n, 3, 5], method, temperature=0, max_tokens=48, ignore_eos=True)
            )
    texts = drain(engine, check=True)
    equal = sum(texts[f"target {n}"].token_ids == texts[f"speculative {n}"].token_ids for n in range(4))
    assert equal >= 3
    assert any(output.num_accepted_tokens for n in range(4) for output in texts[f"speculative {n}"].steps)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        (torch.float32, MAX_RELATIVE_ERROR),
        (torch.bfloat16, MAX_RELATIVE_ERROR_HALF),
        (torch.float16, MAX_RELATIVE_ERROR_HALF),
    ],
)
def test_tree_probe_passes(dtype: torch.dtype, bound: float) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    module = small_llama(dtype)
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(1 if weight.dim() == 1 else 0.3)  # as small as trained weights are
    model = CausalModel(module, rows=4, max_model_len=64, vocab_size=VOCAB, device=torch.device("cuda"))
    assert probe_tree(model) <= bound


@pytest.mark.parametrize("method", METHODS)
def test_step_never_waits_for_the_device(method: str, pair: ModelPair) -> None:
    """Any synchronisation but the engine's one copy raises."""
    engine = Engine(pair, 8)
    for n in range(4):
        engine.add(request(str(n), [n, 3, 5], method, max_tokens=24, seed=n, top_k=5, ignore_eos=True))
    engine.step()
    (batch,) = engine._batches.values()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            METHODS_BY_NAME[method].step(pair, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
