"""Which passes a pair will need, recorded as graphs before there is work: largest first, in one pool."""

from collections.abc import Iterator
from itertools import islice, product

import torch

from decoding.config import DecodingConfig, Preset
from decoding.graphs import CudaRecorder, PassGraphs, Recorder, Shape
from decoding.methods.multi_candidate import level_sizes
from decoding.model import CausalModel
from decoding.model_pair import ModelPair
from decoding.policy import candidates
from decoding.token_tree import TokenTree

MOST_AT_START = 64  # of one model; others are recorded when they are first needed
CATCH_UP = (2, 1)

Kind = tuple[int, int]  # tokens per row, logits kept


def record_graphs(pair: ModelPair, config: DecodingConfig, recorder: Recorder | None = None) -> int:
    """Replay the pair's passes from graphs from now on; returns how many are recorded already.

    Those are what sequences of `config` need. Without a `recorder` only a GPU has graphs, and a model that
    several processes hold has none. Call before an engine has work: rows are used.
    """
    if recorder is None:
        if pair.device.type != "cuda":
            return 0
        recorder = CudaRecorder(pair.device)
    num_recorded = 0
    for role, model in pair.models.items():
        if model.ranks > 1:
            continue
        graphs = model.use_graphs(recorder)
        _record(model, graphs, needed_kinds(role, config))
        num_recorded += len(graphs)
    return num_recorded


def needed_kinds(role: str, config: DecodingConfig) -> list[Kind]:
    """What the model of `role` runs for sequences of `config`, without repeats, plain steps first."""
    preset = config.preset
    shapes = [Preset("target"), *(candidates(preset) if preset.adaptive else [preset])]
    kinds = [kind for shape in shapes for owner, kind in _passes(shape) if owner == role]
    return list(dict.fromkeys(kinds))


def _passes(preset: Preset) -> Iterator[tuple[str, Kind]]:
    method = preset.step_method
    if method in ("target", "draft"):
        yield method, (1, 1)
        return
    if method == "mtjd":
        yield from (("target", (tokens, tokens)) for tokens in (1, preset.width))
        return
    yield "draft", CATCH_UP
    levels = (
        level_sizes(preset.candidates)[1:-1] if preset.candidates else [preset.width] * (preset.depth > 1)
    )
    yield from (("draft", (tokens, tokens)) for tokens in levels)
    verified = 1 + preset.depth if method == "mtad" else preset.num_nodes
    yield "target", (verified, verified)


@torch.inference_mode()
def _record(model: CausalModel, graphs: PassGraphs, kinds: list[Kind]) -> None:
    sizes = product(graphs.live_buckets, graphs.row_buckets, kinds)
    shapes = (Shape(rows, tokens, live, keep) for live, rows, (tokens, keep) in sizes)
    chosen = islice(filter(graphs.fits, shapes), MOST_AT_START)
    model.cache.storage.normal_()  # what rows hold must show in what is compared
    for shape in sorted(chosen, key=lambda shape: shape.size, reverse=True):
        if graphs.enabled:
            _run(model, shape)
    model.cache.storage.zero_()
    model.cache.lengths[:] = [0] * model.cache.rows


def _run(model: CausalModel, shape: Shape) -> None:
    """A pass of that shape over rows of different lengths."""
    longest = min(shape.live - shape.tokens, model.max_model_len - 1)
    rows = slice(0, shape.rows)
    model.cache.lengths[rows] = [max(longest - 3 * row, 0) for row in range(shape.rows)]
    lengths = torch.tensor(model.cache.lengths[rows], device=model.device)
    generator = torch.Generator(model.device).manual_seed(0)
    ids = torch.randint(
        model.vocab_size, (shape.rows, shape.tokens), generator=generator, device=model.device
    )
    if (shape.tokens, shape.keep) == CATCH_UP:
        model.catch_up(rows, lengths, ids)
    else:
        model.forward(rows, lengths, TokenTree.chain_of(ids))
