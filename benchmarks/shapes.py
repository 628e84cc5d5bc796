"""Pair S: random weights in the shapes of a real pair, with synthetic acceptance.

What a step costs, and what the system makes of a given block efficiency, apart from how well two models
agree. The texts mean nothing, so nothing is judged.
"""

import argparse
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.cost import CostTable, measure_costs, needed_passes, speed_up
from benchmarks.generation import generate, sampling_params
from benchmarks.methods import equal_trees
from benchmarks.pairs import linear_bytes, num_parameters
from benchmarks.speed import measure_speed
from benchmarks.synthetic import synthetic_acceptance
from benchmarks.table import describe, describe_speed, environment, finite, header, line
from decoding import DecodingConfig, ModelPair, record_graphs
from decoding.fused import fuse_layers
from decoding.linear import apply_float16_linear, float16_linear_available
from decoding.model import CausalModel

Row = dict[str, Any]
TEMPERATURE = 1.0

# Published configurations; the two-layer draft has the width of its target, as the embedded one.
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "llama-8b-1b": {
        "target": {
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        "draft": {
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    },
    "smollm2-360m-2-layers": {
        role: {
            "vocab_size": 49_152,
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": layers,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "tie_word_embeddings": True,
        }
        for role, layers in (("target", 32), ("draft", 2))
    },
}


def build_shapes(
    shapes: dict[str, dict[str, Any]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    max_model_len: int,
) -> ModelPair:
    """Random weights in `shapes` of `target` and `draft`, built in place on `device`.

    On CPUs that have them, linear layers are held in float16, as for a pair that is served.
    """
    models = {}
    for role, shape in shapes.items():
        with torch.device(device):
            module: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                LlamaConfig(**shape, max_position_embeddings=max_model_len), dtype=dtype
            )
        module.train(False)
        if device.type == "cpu" and dtype == torch.float32:
            fuse_layers(module)
        if device.type == "cpu" and float16_linear_available():
            apply_float16_linear(module)
        models[role] = CausalModel(
            module, rows=rows, max_model_len=max_model_len, vocab_size=shape["vocab_size"], device=device
        )
    return ModelPair(
        target=models["target"],
        draft=models["draft"],
        vocab_size=min(shape["vocab_size"] for shape in shapes.values()),
        max_model_len=max_model_len,
        eos_token_ids=(),
        bos_token_id=None,
        tokenizer_file=Path("none"),
        description="random weights",
    )


def load_shapes(name: str, *, rows: int, max_model_len: int = 1024) -> ModelPair:
    """Pair S of these shapes, in bfloat16 on a GPU, on a CPU as `--dtype auto` serves it.

    Raises:
        ValueError: there are no such shapes.
    """
    if name not in SHAPES:
        raise ValueError(f"no shapes {name!r}; there are: {', '.join(SHAPES)}")
    gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    return build_shapes(
        SHAPES[name],
        device=torch.device("cuda" if gpu else "cpu"),
        dtype=torch.bfloat16 if gpu else torch.float32,
        rows=rows + 1,
        max_model_len=max_model_len,
    )


def configurations(depths: list[int], widths: list[int]) -> list[DecodingConfig]:
    """`target`, and what drafts, at equal depth and equal verified nodes."""
    found = [DecodingConfig(method="target")]
    for depth in depths:
        found.append(DecodingConfig(method="speculative", num_speculative_tokens=depth))
        for width in widths:
            shape = {"num_speculative_tokens": depth, "beam_width": width}
            found += [
                DecodingConfig(method="multi_candidate", candidates_per_level=equal_trees(depth, width)[0]),
                DecodingConfig(method="mtad", **shape),  # type: ignore[arg-type]
                DecodingConfig(method="mmtad", **shape),  # type: ignore[arg-type]
            ]
    return found


def measure(pair: ModelPair, arguments: argparse.Namespace) -> Iterator[tuple[list[Row], CostTable]]:
    """The rows of every batch size in `arguments.batches`, and the cost table measured with them."""
    configs = configurations(arguments.depths, arguments.widths)
    rng = random.Random(arguments.seed)
    for batch in arguments.batches:
        prompts = [
            [rng.randrange(pair.vocab_size) for _ in range(arguments.prompt_length)] for _ in range(batch)
        ]
        context = arguments.prompt_length + arguments.max_tokens // 2
        costs = measure_costs(pair, needed_passes(configs), batch=batch, context=context)
        rows = []
        for block_efficiency in arguments.block_efficiencies:
            with synthetic_acceptance(block_efficiency):
                rows += _rows(pair, prompts, configs, costs, arguments)
        yield rows, costs


def _rows(
    pair: ModelPair,
    prompts: list[list[int]],
    configs: list[DecodingConfig],
    costs: CostTable,
    arguments: argparse.Namespace,
) -> list[Row]:
    params = sampling_params(arguments, TEMPERATURE)
    batch = len(prompts)
    reached = []
    for config in configs:
        results, _ = generate(pair, prompts, params, config, batch)
        reached.append(sum(len(each.token_ids) for each in results) / sum(each.num_steps for each in results))
    speeds = measure_speed(pair, prompts, params, configs, batch, arguments.repeats, lambda text: None)
    return [
        {
            **describe(config),
            "T": TEMPERATURE,
            "batch": batch,
            "BE": efficiency,
            "tokens_per_s": speed.tokens_per_s,
            "spread": speed.spread,
            "repeats": speed.repeats,
            "step_ms": speed.step_seconds * 1e3,
            "cpu_ms_per_token": speed.cpu_seconds_per_token * 1e3,
            **describe_speed(speed_up(config, costs, efficiency, speed.step_seconds, speeds[0].step_seconds)),
        }
        for config, efficiency, speed in zip(configs, reached, speeds, strict=True)
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What only pair S is told."""
    group = parser.add_argument_group("pair S")
    group.add_argument("--shapes", default="llama-8b-1b", choices=SHAPES)
    group.add_argument("--block-efficiencies", type=float, nargs="+", default=[2.0, 3.0, 4.0])
    group.add_argument("--batches", type=int, nargs="+", default=[1])
    group.add_argument("--prompt-length", type=int, default=64)
    group.add_argument("--enforce-eager", action="store_true", help="no captured graphs on a GPU")


def run(arguments: argparse.Namespace, show: Callable[[str], None]) -> dict[str, Any]:
    """Measure pair S; the JSON document.

    Raises:
        ValueError: a block efficiency below 1, or more tokens than fit into the context.
    """
    pair = load_shapes(arguments.shapes, rows=max(arguments.batches))
    if not arguments.enforce_eager:
        record_graphs(pair, DecodingConfig(method="target"))  # the others when they come up
    if arguments.prompt_length + arguments.max_tokens > pair.max_model_len:
        raise ValueError(f"--prompt-length and --max-tokens exceed {pair.max_model_len} tokens together")
    document: dict[str, Any] = {"settings": vars(arguments), "costs": [], "rows": []}
    for rows, costs in measure(pair, arguments):
        shared = {
            **environment(
                f"S({arguments.shapes})",
                pair,
                costs,
                parameters=(num_parameters(pair.target), num_parameters(pair.models["draft"])),
                step_bytes=linear_bytes(pair.target.module),
                dtype=str(pair.target.dtype).removeprefix("torch."),
            ),
            "prompt_length": arguments.prompt_length,
            "max_tokens": arguments.max_tokens,
        }
        document["costs"].append(costs.as_json())
        show(" ".join(f"{key}={value}" for key, value in {**shared, **costs.as_json()}.items()))
        show(header())
        for row in rows:
            show(line(row))
        document["rows"] += [finite({**row, **shared}) for row in rows]
    return document
