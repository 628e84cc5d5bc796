"""Rows of results: what is printed of each, and where the figures come from."""

import math
import os
import platform
from typing import Any

import torch

from benchmarks.cost import CostTable, SpeedUp
from benchmarks.generation import Generation
from benchmarks.load.processes import commit
from benchmarks.quality import distinct, longest_repeat, survival
from decoding import DecodingConfig, ModelPair

COLUMNS = (
    ("method", "<15"),
    ("T", ">3"),
    ("depth", ">5"),
    ("width", ">5"),
    ("nodes", ">5"),
    ("reference", "<9"),
    ("tau", ">4"),
    ("BE", ">5.2f"),
    ("log_prob", ">8.4f"),
    ("difference", ">10.4f"),
    ("interval", ">17"),
    ("ppl_ratio", ">9.3f"),
    ("accepted_nats", ">13.3f"),
    ("own_nats", ">8.3f"),
    ("own_share", ">9.2f"),
    ("gap_share", ">9.2f"),
    ("right", ">6.3f"),
    ("right_ratio", ">11.3f"),
    ("ratio_interval", ">14"),
    ("distinct_3", ">10.3f"),
    ("repeat", ">6.1f"),
    ("length", ">6.1f"),
    ("ended", ">5.2f"),
    ("tokens_per_s", ">12.1f"),
    ("spread", ">6.2f"),
    ("S", ">5.2f"),
    ("S_bound", ">7.2f"),
    ("S_free", ">6.2f"),
    ("S/S_bound", ">9.2f"),
    ("h", ">6.2f"),
    ("host_share", ">10.2f"),
    ("cpu_ms_per_token", ">16.2f"),
)


def header() -> str:
    return "  ".join(f"{name:{_alignment(spec)}}" for name, spec in COLUMNS)


def line(row: dict[str, Any]) -> str:
    """One row of the table; what a row does not have is a dash."""
    return "  ".join(_cell(row.get(name), spec) for name, spec in COLUMNS)


def finite(value: Any) -> Any:
    """`value` as JSON can hold it: what is not a number becomes null, also inside lists and objects."""
    match value:
        case dict():
            return {key: finite(each) for key, each in value.items()}
        case list():
            return [finite(each) for each in value]
        case float() if not math.isfinite(value):
            return None
    return value


def _cell(value: Any, spec: str) -> str:
    if value is None or value != value:
        return f"{'-':{_alignment(spec)}}"
    if isinstance(value, list) and None in finite(value):
        return _cell(None, spec)
    if isinstance(value, list):
        value = "..".join(f"{each:.3f}" for each in value)
    return f"{value:{spec}}" if spec[-1] == "f" else f"{value!s:{spec}}"


def _alignment(spec: str) -> str:
    return spec.partition(".")[0]


def describe(config: DecodingConfig) -> dict[str, Any]:
    """A configuration's numbers; one that the method does not use is absent."""
    preset = config.preset
    joint = config.method in ("mtad", "mmtad")
    nodes = preset.depth if config.method == "mtad" else preset.num_nodes - 1
    name: str = config.method
    if config.acceptance == "block" and name == "speculative":
        name = "spec. block"
    if preset.candidates:
        name = "multi " + "x".join(map(str, preset.candidates))
    return {
        "method": name,
        "depth": preset.depth or None,
        "width": preset.width or None,
        "nodes": nodes or None,
        "reference": config.acceptance_reference if joint else None,
        "tau": config.acceptance_threshold if joint else None,
    }


def describe_texts(results: list[Generation]) -> dict[str, Any]:
    """What was written: lengths, ends, repetition, and per-depth survival of what was proposed."""
    tokens = sum(len(result.token_ids) for result in results)
    accepted = [each for result in results for each in result.accepted]
    drafted = [each for result in results for each in result.drafted]
    return {
        "texts": len(results),
        "tokens": tokens,
        "BE": tokens / sum(result.num_steps for result in results),
        "survival": [round(share, 4) for share in survival(accepted, drafted)],
        "distinct_3": sum(distinct(result.token_ids) for result in results) / len(results),
        "repeat": sum(longest_repeat(result.token_ids) for result in results) / len(results),
        "length": tokens / len(results),
        "ended": sum(result.ended for result in results) / len(results),
    }


def describe_speed(values: SpeedUp) -> dict[str, Any]:
    return {
        "draft_cost": values.draft,
        "verify_cost": values.verify,
        "h": values.host,
        "host_share": values.host_share,
        "S": values.actual,
        "S_bound": values.bound,
        "S_free": values.free,
        "S/S_bound": values.actual / values.bound,
    }


def environment(
    label: str, pair: ModelPair, costs: CostTable, *, parameters: tuple[int, int], step_bytes: int, dtype: str
) -> dict[str, Any]:
    """Where the figures come from; it holds for every row of a run.

    `parameters` are those of target and draft, `step_bytes` the weights that one pass of the target streams.
    """
    return {
        "pair": label,
        "models": pair.description,
        "parameters": list(parameters),
        "dtype": dtype,
        "bytes_per_step": step_bytes,
        "copy_gb_per_s": round(costs.copy_bandwidth / 1e9, 2),
        "device": _device_name(pair.device),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
