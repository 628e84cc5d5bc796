"""The same engine on CUDA: needs torch, transformers, safetensors and random weights, nothing else."""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import decode
from benchmarks.shapes import SHAPES, load_shapes
from decoding import DecodingConfig, Engine, ModelPair, record_graphs
from decoding.methods import METHODS_BY_NAME
from decoding.model import CausalModel
from decoding.probe import probe_tree
from tests.decoding.laws import ADJUSTING
from tests.decoding.tiny import LOSSLESS, METHODS, Text, drain, make_pair, perturbed, request, stock

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


def replaying(pair: ModelPair, config: DecodingConfig | None = None) -> ModelPair:
    """The same models in a pair whose passes are replayed, which the other one's then are not."""
    models = {role: copy.copy(model) for role, model in pair.models.items()}
    pair = replace(pair, target=models["target"], draft=models["draft"])
    record_graphs(pair, config or DecodingConfig(method="target"))
    return pair


def num_graphs(pair: ModelPair) -> int:
    graphs = [model.graphs for model in pair.models.values() if model.graphs is not None]
    assert len(graphs) == 2
    assert all(each.enabled for each in graphs), "recording failed: the warning says why"
    return sum(map(len, graphs))


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 0.9, "top_k": 20}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_text_is_the_same_with_graphs(method: Any, fields: dict[str, Any], pair: ModelPair) -> None:
    """Twelve texts of different lengths in eight rows; float32, up to rounding, eleven of them equal."""

    def run(pair: ModelPair) -> dict[str, Text]:
        engine = Engine(pair, 8, prefill_chunk=32)
        for n in range(12):
            settings = {"max_tokens": 8 + 3 * n, "seed": n, "ignore_eos": True, **fields}
            engine.add(request(str(n), [n + 1] * (1 + 5 * n), method, **settings))
        return drain(engine, check=True)

    recorded = replaying(pair, DecodingConfig(method=method))
    expected, found = run(pair), run(recorded)
    assert sum(found[name].token_ids == text.token_ids for name, text in expected.items()) >= 11
    assert num_graphs(recorded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_graphs_are_recorded_in_every_number_type(dtype: torch.dtype) -> None:
    settings: dict[str, Any] = {"vocab_size": VOCAB, "rows": 9, "max_model_len": 600}
    module = small_llama(dtype)
    pair = make_pair(module, small_llama(dtype), device=torch.device("cuda"), **settings)
    assert record_graphs(pair, DecodingConfig(method="mmtad", adaptive=True)) == num_graphs(pair) > 80


def test_graphs_share_one_pool_of_memory() -> None:
    """A graph costs its launches and its inputs, not the memory that its pass needs."""
    pair = load_shapes("smollm2-360m-2-layers", rows=16)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    record_graphs(pair, DecodingConfig(method="mmtad", adaptive=True))
    num_recorded = num_graphs(pair)
    torch.cuda.empty_cache()
    added = torch.cuda.memory_reserved() - before
    largest = 16 * 17 * pair.vocab_size * 4  # bytes of the logits of a whole batch's trees
    assert added < 16 * largest < num_recorded * largest / 5, f"{num_recorded} graphs, {added} bytes"


@pytest.mark.parametrize("shapes", SHAPES)
def test_pair_s_with_and_without_graphs(shapes: str, record_property: Callable[[str, object], None]) -> None:
    """Step times and S of both as properties; graphs make no step slower. Batch 1, block efficiency 3."""
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    rows = []
    for flags in (["--enforce-eager"], []):
        arguments = ["--pair", "S", "--shapes", shapes, "--block-efficiencies", "3", "--repeats", "3", *flags]
        rows.append(decode.run(decode.parse_arguments(arguments), lambda text: None)["rows"])
    for eager, captured in zip(*rows, strict=True):
        steps, speed_ups = [[row[name] for row in (eager, captured)] for name in ("step_ms", "S")]
        record_property(f"{shapes} {eager['method']}: ms per step, eager and captured", steps)
        record_property(f"{shapes} {eager['method']}: S, eager and captured", speed_ups)
        assert steps[1] < 1.05 * steps[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 0.9, "top_k": 20},
        {"top_p": 0.9},
        {"min_p": 0.1, **ADJUSTING["all"]},
        {"temperature": 0, **ADJUSTING["all"]},
    ],
    ids=str,
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


@pytest.mark.parametrize("fields", [{}, ADJUSTING["all"]], ids=["none", "all"])
@pytest.mark.parametrize("method", LOSSLESS.values(), ids=LOSSLESS)
def test_greedy_lossless_equals_target(
    method: dict[str, Any], fields: dict[str, Any], pair: ModelPair
) -> None:
    """Float32, up to rounding that flips a decision: three of four texts."""
    engine = Engine(pair, 8)
    for name, settings in (("target", {"method": "target"}), ("lossless", method)):
        for n in range(4):
            sequence = request(
                f"{name} {n}",
                [n, 3, 5],
                temperature=0,
                max_tokens=48,
                ignore_eos=True,
                **settings,
                **fields,
            )
            engine.add(sequence)
    texts = drain(engine, check=True)
    equal = sum(texts[f"target {n}"].token_ids == texts[f"lossless {n}"].token_ids for n in range(4))
    assert equal >= 3
    assert any(output.num_accepted_tokens for n in range(4) for output in texts[f"lossless {n}"].steps)


@pytest.mark.parametrize("method", ["target", "draft", "mmtad", "mtjd"])
def test_log_probs_equal_a_plain_forward(method: str, pair: ModelPair) -> None:
    """Delivered, top and prompt log-probs, to 1e-3 in float32 on a device whose sums are reordered."""
    torch.backends.cuda.matmul.allow_tf32 = False
    sequence = request(
        "a", [5, 9, 3, 40], method, max_tokens=24, num_top_log_probs=3, prompt_log_probs=True, ignore_eos=True
    )
    engine = Engine(pair, 2, prefill_chunk=2)
    engine.add(sequence)
    text = drain(engine, check=True)["a"]
    model = pair.models["draft" if method == "draft" else "target"]
    ids = torch.tensor([sequence.prompt_ids + text.token_ids], device=model.device)
    with torch.inference_mode():
        logits = stock(model)(input_ids=ids, use_cache=False).logits[0, :-1]
    expected = logits.float().log_softmax(-1).cpu()
    values = expected.gather(1, ids[0, 1:, None].cpu())[:, 0].tolist()
    assert text.prompt_log_probs is not None
    found = [each.log_prob for each in text.prompt_log_probs] + text.log_probs
    assert found == pytest.approx(values, abs=1e-3)
    tops = [each.top for each in text.prompt_log_probs] + text.tops
    for top, row in zip(tops, expected, strict=True):
        assert [value for _, value in top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tree_probe_passes(dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    module = small_llama(dtype)
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(1 if weight.dim() == 1 else 0.3)  # as small as trained weights are
    model = CausalModel(module, rows=4, max_model_len=64, vocab_size=VOCAB, device=torch.device("cuda"))
    probe_tree(model)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("method", METHODS)
def test_step_never_waits_for_the_device(method: str, graphs: bool, pair: ModelPair) -> None:
    """Any synchronisation but the engine's one copy raises."""
    if graphs:
        pair = replaying(pair)
    engine = Engine(pair, 8)
    for n in range(4):
        fields = {"top_k": 5, "num_top_log_probs": n} | (ADJUSTING["all"] if n % 2 else {})
        engine.add(request(str(n), [n, 3, 5], method, max_tokens=24, seed=n, ignore_eos=True, **fields))
    engine.step()
    engine.step()  # all graphs are recorded
    (batch,) = engine._batches.values()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            METHODS_BY_NAME[method].step(pair, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
