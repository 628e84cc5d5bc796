"""Whether a model can be served with token trees: a small tree against plain recomputation."""

import random

import torch
from torch import Tensor

from decoding.attention import ATTENTION_NAME
from decoding.errors import ModelLoadError
from decoding.host import to_host
from decoding.model import CausalModel
from decoding.token_tree import TokenTree

PROMPT_LENGTHS = (3, 7, 12)
PROBE_ROWS = len(PROMPT_LENGTHS)
PARENTS = (0, 0, 0, 1, 1, 3)
LEVELS = ((1, 3), (3, 5), (5, 6))  # nodes at depth 1, 2, 3: first and end
PATHS = {2: (2,), 4: (1, 4), 5: (1, 3, 5)}  # leaf: its path behind the root
ACCEPTED = 5
MAX_RELATIVE_ERROR = 1e-4
MAX_RELATIVE_ERROR_HALF = 1e-2

_PROBE_FAILURES = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def refusal(model_type: str, reason: str) -> ModelLoadError:
    """The one line that says why a model type is not served."""
    return ModelLoadError(
        f"model type {model_type!r} cannot be served with token trees ({reason}); use a model with plain "
        "attention over a key-value cache, such as llama, qwen2, qwen3, mistral, gemma2, gemma3 or gpt2"
    )


def probe_tree(model: CausalModel) -> float:
    """Run three ragged rows, a tree, a commit and one more step; return the largest relative error.

    Raises:
        ModelLoadError: the error is beyond 1e-4 in float32 or 1e-2 in half precision, or the model
            cannot run such a pass at all.
    """
    kind = model.module.config.model_type
    # GPT-Neo keeps its own attention, whose local windows no probe of a few tokens would show.
    if model.module.config.get_text_config()._attn_implementation != ATTENTION_NAME:
        raise refusal(kind, "its attention cannot be replaced")
    try:
        error = _tree_error(model)
    except _PROBE_FAILURES as cause:
        raise refusal(kind, f"{type(cause).__name__} in the tree probe") from cause
    half = model.dtype in (torch.float16, torch.bfloat16)
    allowed = MAX_RELATIVE_ERROR_HALF if half else MAX_RELATIVE_ERROR
    if not error <= allowed:
        raise refusal(kind, f"the tree probe is off by {error:.1e} against plain recomputation")
    return error


@torch.inference_mode()
def _tree_error(model: CausalModel) -> float:
    rng = random.Random(0)
    prompts = [_random_ids(rng, model.vocab_size, length) for length in PROMPT_LENGTHS]
    nodes = [_random_ids(rng, model.vocab_size, len(PARENTS)) for _ in prompts]
    next_roots = _random_ids(rng, model.vocab_size, len(prompts))
    rows = slice(0, len(prompts))
    lengths = torch.tensor(PROMPT_LENGTHS, device=model.device)
    _set_lengths(model, (0, 0, 0))
    for row, prompt in enumerate(prompts):
        model.prefill(row, prompt)

    tree = _tree(model, nodes)
    in_tree = model.forward(rows, lengths, tree)
    model.commit(rows, lengths, tree.path(torch.full_like(lengths, ACCEPTED), len(LEVELS)))
    committed = 1 + len(PATHS[ACCEPTED])
    _set_lengths(model, tuple(length + committed for length in PROMPT_LENGTHS))
    roots = torch.tensor(next_roots, device=model.device)
    after = model.forward(rows, lengths + committed, TokenTree.of_roots(roots, 1))
    _set_lengths(model, (0, 0, 0))

    found, sequences = [], []
    for row, prompt in enumerate(prompts):
        texts = {
            leaf: [*prompt, nodes[row][0], *(nodes[row][n] for n in path)] for leaf, path in PATHS.items()
        }
        sequences += [*texts.values(), [*texts[ACCEPTED], next_roots[row]]]
        found += [*(in_tree[row, leaf] for leaf in PATHS), after[row, 0]]
    if model.output_ids is not None:
        found = [logits[model.output_ids] for logits in found]
    return _largest_error(found, _recompute(model, sequences))


def _random_ids(rng: random.Random, vocab_size: int, count: int) -> list[int]:
    return [rng.randrange(vocab_size) for _ in range(count)]


def _set_lengths(model: CausalModel, lengths: tuple[int, ...]) -> None:
    model.cache.lengths[: len(lengths)] = lengths


def _tree(model: CausalModel, nodes: list[list[int]]) -> TokenTree:
    token_ids = torch.tensor(nodes, device=model.device)
    parents = torch.tensor(PARENTS, device=model.device).expand_as(token_ids)
    tree = TokenTree.of_roots(token_ids[:, 0], len(PARENTS))
    for depth, (first, end) in enumerate(LEVELS, start=1):
        level = slice(first, end)
        tree.add_level(
            first,
            depth,
            token_ids=token_ids[:, level],
            parents=parents[:, level],
            draft_log_probs=torch.zeros_like(token_ids[:, level], dtype=torch.float64),
            ended=torch.zeros_like(token_ids[:, level], dtype=torch.bool),
        )
    return tree


def _recompute(model: CausalModel, sequences: list[list[int]]) -> list[Tensor]:
    """The last logits of each sequence by a stock forward without any cache, as the head gives them."""
    model.module.set_attn_implementation("eager")
    try:
        return [_last_logits(model, sequence) for sequence in sequences]
    finally:
        model.module.set_attn_implementation(ATTENTION_NAME)


def _last_logits(model: CausalModel, sequence: list[int]) -> Tensor:
    input_ids = torch.tensor([sequence], device=model.device)
    logits: Tensor = model.module(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits
    return logits[0, -1, : model.vocab_size].float()


def _largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference over the largest value, as a number; not finite if any value is not."""
    difference = (torch.stack(found) - torch.stack(expected)).abs().max()
    error: float = to_host(difference / torch.stack(expected).abs().max())  # type: ignore[assignment]
    return error
