"""Load a target and a draft, check that they belong together and can be served, and say what they are."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decoding.checkpoint import (
    Source,
    load_module,
    load_tokenizer,
    read_output_head,
    refuse_own_code,
    refuse_split,
)
from decoding.embedded import OUTPUT_HEAD_FILE
from decoding.errors import ModelLoadError
from decoding.followers import Followers, LeadingModel
from decoding.fused import fuse_layers
from decoding.host import to_host
from decoding.linear import apply_float16_linear
from decoding.model import CausalModel
from decoding.model_pair import ChatFormat, ModelPair
from decoding.module import OutputHead
from decoding.precision import Precision, choose_device, choose_precision
from decoding.probe import PROBE_ROWS, probe_tree, refusal
from decoding.timing import timed

MAX_MODEL_LEN = 4096
CACHE_DIR = Path.home() / ".cache" / "mmtad"


def load_model_pair(
    target: str,
    draft: str | None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_model_len: int | None = None,
    max_num_seqs: int = 16,
    tensor_parallel_size: int = 1,
) -> ModelPair:
    """Load both models from hub ids, folders or GGUF files, with caches for `max_num_seqs` sequences.

    On CPUs `auto` and `float16` hold linear layers in float16 and compute in float32; `bfloat16` is
    upcast without AVX-512. `max_model_len` defaults to the models' own, at most 4096 tokens. Above 1
    `tensor_parallel_size` is the number of processes that hold the target together, this one and children
    of it, for the rest of its life; the draft is held by this one alone.

    Raises:
        ModelLoadError: the files cannot be loaded, the vocabularies differ or a model cannot run token
            trees; one line that names the cause and the cure.
    """
    ranks = tensor_parallel_size
    place = choose_device(device, ranks)
    precision = choose_precision(dtype, place, ranks)
    sources = [Source.of(name) for name in (target, draft) if name is not None]
    for source in sources:
        refuse_own_code(source)
    followers = None if ranks == 1 else _split(sources[0], ranks, dtype, place)
    tokenizers = [load_tokenizer(source) for source in sources]
    if draft is not None:
        _check_vocabulary(*tokenizers)
    heads = [None, *(read_output_head(source) for source in sources[1:])]
    loaded = _load_modules(sources, heads, precision.dtype, followers)
    modules = [module for module, _ in loaded]
    vocab_size = min(len(tokenizers[0]), *(module.config.get_text_config().vocab_size for module in modules))
    context = _max_model_len(modules, max_model_len)
    sizes = [sum(weight.numel() for weight in module.parameters()) for module in modules]
    shares, models = [], []
    for module, head, leads in zip(modules, heads, (followers, None), strict=False):
        output_ids = None if head is None else head.token_ids
        if output_ids is not None:
            special_ids = {*tokenizers[0].all_special_ids, *_eos_token_ids(modules[0], tokenizers[0])}
            _check_output_ids(output_ids, vocab_size, special_ids)
        shares.append(_quicken(module, precision, place) if leads is None else 0.0)
        rows = max(max_num_seqs + 1, PROBE_ROWS)
        models.append(_serve(module, leads, rows, context, vocab_size, place, output_ids))
    return ModelPair(
        target=models[0],
        draft=models[1] if draft is not None else None,
        vocab_size=vocab_size,
        max_model_len=context,
        eos_token_ids=_eos_token_ids(modules[0], tokenizers[0]),
        bos_token_id=tokenizers[0].bos_token_id,
        tokenizer_file=_save_tokenizer(tokenizers[0]),
        description=_describe(sources, modules, sizes, shares, precision, place, ranks),
        chat=ChatFormat.of(tokenizers[0]),
        load_seconds=dict(zip(("target", "draft"), (seconds for _, seconds in loaded), strict=False)),
    )


def _check_vocabulary(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> None:
    special = [(each.bos_token_id, each.eos_token_id) for each in (target, draft)]
    if target.get_vocab() != draft.get_vocab() or special[0] != special[1]:
        raise ModelLoadError(
            "the draft's vocabulary differs from the target's (token ids or special ids); "
            "use a draft trained with the target's tokenizer, or serve the target alone"
        )


def _check_output_ids(output_ids: Tensor, vocab_size: int, special_ids: set[int]) -> None:
    """The map from a cut head's rows to token ids must be one to one, in bounds, and keep special ids."""
    ids = to_host(output_ids)
    kept = set(ids)
    if len(kept) == len(ids) and kept.issubset(range(vocab_size)) and kept.issuperset(special_ids):
        return
    raise ModelLoadError(
        f"the token ids in the draft's {OUTPUT_HEAD_FILE} repeat, exceed the vocabulary or lack special ids; "
        "make the draft again with scripts/distill-draft"
    )


def _max_model_len(modules: list[PreTrainedModel], wanted: int | None) -> int:
    configs = [module.config.get_text_config() for module in modules]
    own = min(getattr(config, "max_position_embeddings", None) or MAX_MODEL_LEN for config in configs)
    if wanted is None:
        return min(own, MAX_MODEL_LEN)
    if not 2 <= wanted <= own:
        raise ModelLoadError(f"max_model_len must be between 2 and the models' own {own}, not {wanted}")
    return wanted


def _split(source: Source, ranks: int, dtype: str, device: torch.device) -> Followers:
    refuse_split(source, ranks)
    if device.type == "cpu" and torch.cuda.is_available():
        raise ModelLoadError(
            f"--tensor-parallel-size {ranks} takes GPUs where there are any; hide them with "
            "CUDA_VISIBLE_DEVICES= to use --device cpu"
        )
    if device.type == "cuda" and torch.cuda.device_count() < ranks:
        raise ModelLoadError(
            f"--tensor-parallel-size {ranks} needs as many GPUs, of which {torch.cuda.device_count()} are "
            "visible; give a smaller number, or more of them in CUDA_VISIBLE_DEVICES"
        )
    return Followers(ranks, target=source.name, dtype=dtype, device=device.type)


def _load_modules(
    sources: list[Source], heads: list[OutputHead | None], dtype: torch.dtype, followers: Followers | None
) -> list[tuple[PreTrainedModel, float]]:
    """Each model's module, of a split target the share of this rank, and the seconds that it took."""
    ranks = 1 if followers is None else followers.ranks
    loaded = [
        timed(load_module, source, head, dtype, count)
        for source, head, count in zip(sources, heads, (ranks, 1), strict=False)
    ]
    if followers is not None:
        followers.confirm()
    return loaded


def _quicken(module: PreTrainedModel, precision: Precision, device: torch.device) -> float:
    """Put quicker layers in the place of stock ones on a CPU; returns the share of float16 weights."""
    if device.type == "cpu" and precision.dtype == torch.float32:
        fuse_layers(module)
    return apply_float16_linear(module) if precision.float16_linear else 0.0


def _serve(
    module: PreTrainedModel,
    followers: Followers | None,
    rows: int,
    max_model_len: int,
    vocab_size: int,
    device: torch.device,
    output_ids: Tensor | None,
) -> CausalModel:
    settings: dict[str, Any] = {"rows": rows, "max_model_len": max_model_len, "vocab_size": vocab_size}
    try:
        if followers is not None:
            model: CausalModel = LeadingModel(module, followers, device=device, **settings)
        else:
            model = CausalModel(module, device=device, output_ids=output_ids, **settings)
    except (AttributeError, TypeError, ValueError) as cause:
        raise refusal(module.config.model_type, "it has no attention cache") from cause
    probe_tree(model)
    return model


def _eos_token_ids(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    configured: Any = getattr(module.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({each for each in (*ids, tokenizer.eos_token_id) if each is not None}))


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write the tokenizer as the one file that a process without transformers can read."""
    content = tokenizer.backend_tokenizer.to_str()
    folder = CACHE_DIR / "tokenizers"
    path = folder / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)
    return path


def _describe(
    sources: list[Source],
    modules: list[PreTrainedModel],
    sizes: list[int],
    shares: list[float],
    precision: Precision,
    device: torch.device,
    ranks: int,
) -> str:
    parts = [
        f"{source.label} ({module.config.model_type}, {size / 1e6:.0f}M)"
        for source, module, size in zip(sources, modules, sizes, strict=True)
    ]
    if ranks > 1:
        parts[0] += f" over {ranks} ranks"
    reduced = f" ({min(shares):.0%} of weights)" if precision.float16_linear else ""
    where = f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    return f"{' + draft '.join(parts)}; {precision.note}{reduced}; {where}"
