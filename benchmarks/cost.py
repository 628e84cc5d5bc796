"""What passes cost on this machine, and the speed-ups that follow from it.

All costs are over the target's pass of one token per row at the same batch: v_T for T tokens of the
target, c_W for W of the draft, c_2 for the draft's catch-up, h for all else in a step.

    S = BE (1 + h_off) / (draft + verify + h), S_bound with h = h_off = 0, S_free also with v_T = 1
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from decoding import DecodingConfig, ModelPair
from decoding.model import CausalModel
from decoding.token_tree import TokenTree

CATCH_UP = 0  # stands for the tokens of a draft pass that catches up
TARGET_TOKENS = (1, 2, 4, 5, 8, 13, 17, 33)
DRAFT_TOKENS = (CATCH_UP, 1, 2, 4, 8)
Pass = tuple[str, int]  # role, tokens per row
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class CostTable:
    """Median seconds of each pass at one batch size and context length, and the copy bandwidth in bytes/s."""

    batch: int
    context: int
    seconds: dict[Pass, float]
    copy_bandwidth: float

    @property
    def unit(self) -> float:
        return self.seconds["target", 1]

    def ratio(self, passes: Iterable[Pass]) -> float:
        """The cost of `passes` over that of one plain target pass."""
        return sum(self.seconds[each] for each in passes) / self.unit

    def as_json(self) -> dict[str, object]:
        def label(role: str, tokens: int) -> str:
            return "c_2" if tokens == CATCH_UP else f"{'v' if role == 'target' else 'c'}_{tokens}"

        ratios = {label(*each): round(self.ratio([each]), 4) for each in sorted(self.seconds)}
        return {
            "batch": self.batch,
            "context": self.context,
            "unit_ms": self.unit * 1e3,
            "copy_gb_per_s": self.copy_bandwidth / 1e9,
            **ratios,
        }


def draft_passes(config: DecodingConfig) -> list[Pass]:
    """The draft's passes in one step, the catch-up first; of the target for `mtjd`, which has no draft."""
    preset = config.preset
    match config.method:
        case "target" | "draft":
            return []
        case "mtjd":
            return [("target", 1), *[("target", preset.width)] * (preset.depth - 2)]
        case "speculative":
            sizes = [1] * (preset.depth - 1)
        case "multi_candidate":
            sizes = [math.prod(preset.candidates[:depth]) for depth in range(1, preset.depth)]
        case _:
            sizes = [preset.width] * (preset.depth - 1)
    return [("draft", CATCH_UP), *(("draft", size) for size in sizes)]


def last_pass(config: DecodingConfig) -> Pass:
    """The pass that gives a step its tokens: verification, or the only pass of a plain step."""
    preset = config.preset
    match config.method:
        case "target" | "draft":
            return config.method, 1
        case "mtjd":
            return "target", preset.width if preset.depth > 1 else 1
        case "mtad":
            return "target", preset.depth + 1
    return "target", preset.num_nodes


def needed_passes(configs: Iterable[DecodingConfig]) -> set[Pass]:
    """All passes that the steps of `configs` consist of, and those of a standard table."""
    needed = {("target", tokens) for tokens in TARGET_TOKENS} | {("draft", tokens) for tokens in DRAFT_TOKENS}
    for config in configs:
        needed |= {*draft_passes(config), last_pass(config)}
    return needed


def measure_costs(
    pair: ModelPair, passes: Iterable[Pass], *, batch: int, context: int, rounds: int = 25
) -> CostTable:
    """Time every pass once per round, all of them in turn, behind `context` committed tokens per row."""
    seconds = time_passes(pair, passes, batch=batch, context=context, rounds=rounds)
    return CostTable(batch, context, seconds, copy_bandwidth(pair.device))


def time_passes(
    pair: ModelPair,
    passes: Iterable[Pass],
    *,
    batch: int,
    context: int,
    rounds: int,
    clock: Clock = time.perf_counter,
) -> dict[Pass, float]:
    """Median seconds of each pass by `clock`, the caches left empty."""
    runs = {each: _runner(pair, *each, batch, context) for each in sorted(passes)}
    samples: dict[Pass, list[float]] = {each: [] for each in runs}
    for model in pair.models.values():
        model.cache.lengths[:batch] = [context] * batch
    try:
        for number in range(rounds + 2):
            for each, run in runs.items():
                seconds = _seconds(run, pair.device, clock)
                if number >= 2:  # the first rounds only warm up
                    samples[each].append(seconds)
    finally:
        for model in pair.models.values():
            model.cache.lengths[:batch] = [0] * batch
    return {each: statistics.median(values) for each, values in samples.items()}


def _runner(pair: ModelPair, role: str, tokens: int, batch: int, context: int) -> Callable[[], object]:
    model: CausalModel = pair.models[role]
    rows = slice(0, batch)
    lengths = torch.full((batch,), context, device=pair.device)
    roots = torch.zeros_like(lengths)
    if tokens == CATCH_UP:
        return lambda: model.catch_up(rows, lengths, torch.stack([roots, roots], 1))
    tree = TokenTree.of_roots(roots, tokens)
    return lambda: model.forward(rows, lengths, tree)


def _seconds(run: Callable[[], object], device: torch.device, clock: Clock = time.perf_counter) -> float:
    started = clock()
    with torch.inference_mode():
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def copy_bandwidth(device: torch.device, size: int = 1 << 27) -> float:
    """Bytes read and written per second by a copy of `size` bytes, the best of five."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = min(_seconds(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * size / seconds


@dataclass(frozen=True, slots=True)
class SpeedUp:
    """Speed over the plain target's; `draft`, `verify`, `host` are the costs of one step in its passes."""

    draft: float
    verify: float
    host: float
    actual: float
    bound: float
    free: float

    @property
    def host_share(self) -> float:
        return self.host / (self.draft + self.verify + self.host)


def speed_up(
    config: DecodingConfig, costs: CostTable, block_efficiency: float, step: float, plain_step: float
) -> SpeedUp:
    """From the seconds of one step and of one of `target` at the same batch."""
    draft = costs.ratio(draft_passes(config))
    verify = costs.ratio([last_pass(config)])
    host = step / costs.unit - draft - verify
    host_off = plain_step / costs.unit - 1
    free = verify if config.method in ("draft", "mtjd") else 1.0
    return SpeedUp(
        draft=draft,
        verify=verify,
        host=host,
        actual=block_efficiency * (1 + host_off) / (draft + verify + host),
        bound=block_efficiency / (draft + verify),
        free=block_efficiency / (draft + free),
    )
