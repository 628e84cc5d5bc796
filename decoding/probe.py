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
MAX_RELATIVE_ERROR = 1e-4  # of float32
# In half precision rounding alone may be as large as a small mistake, so it is measured: without a tree.
MAX_TIMES_ROUNDING = 2.0
MIN_ROUNDING, MAX_ROUNDING = 0.01, 0.1

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
    """Run three ragged rows, a tree, a commit and one more step; return the error against stock passes.

    In float32 it is the largest, relative to the largest logit. In half precision it is the norm of all
    errors, relative to that of the logits around their mean.

    Raises:
        ModelLoadError: the error is beyond 1e-4 in float32, or in half precision beyond twice that of rows
            without a tree; or the model cannot run such a pass at all.
    """
    kind = model.module.config.model_type
    # GPT-Neo keeps its own attention, whose local windows no probe of a few tokens would show.
    if model.module.config.get_text_config()._attn_implementation != ATTENTION_NAME:
        raise refusal(kind, "its attention cannot be replaced")
    try:
        error, allowed = _errors(model)
    except _PROBE_FAILURES as cause:
        raise refusal(kind, f"{type(cause.__cause__ or cause).__name__} in the tree probe") from cause
    if not error <= allowed:
        raise refusal(
            kind,
            f"the tree probe is off by {error:.1e} against plain recomputation, {allowed:.1e} are allowed",
        )
    return error


@torch.inference_mode()
def _errors(model: CausalModel) -> tuple[float, float]:
    """The error of tree rows, and what it may be."""
    sequences, found = _run_tree(model)
    expected = [model.plain_logits(sequence) for sequence in sequences]
    if model.dtype not in (torch.float16, torch.bfloat16):
        return _largest_error(found, expected), MAX_RELATIVE_ERROR
    rounding = _relative_norm(_run_plain(model, sequences), expected)
    rounding = min(max(rounding, MIN_ROUNDING), MAX_ROUNDING)
    return _relative_norm(found, expected), MAX_TIMES_ROUNDING * rounding


def _run_tree(model: CausalModel) -> tuple[list[list[int]], list[Tensor]]:
    """Sequences of tokens that end in a node of a tree or behind one, and the logits found there."""
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
    return sequences, [_own_logits(model, logits) for logits in found]


def _run_plain(model: CausalModel, sequences: list[list[int]]) -> list[Tensor]:
    """The last logits of each sequence as a row without a tree gives them."""
    found = []
    for sequence in sequences:
        _set_lengths(model, (0,))
        found.append(_own_logits(model, model.prefill(0, sequence)[0]))
    _set_lengths(model, (0,))
    return found


def _own_logits(model: CausalModel, logits: Tensor) -> Tensor:
    """Those that the head gives."""
    return logits if model.output_ids is None else logits[model.output_ids]


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


def _largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference over the largest value, as a number; not finite if any value is not."""
    difference = (torch.stack(found) - torch.stack(expected)).abs().max()
    error: float = to_host(difference / torch.stack(expected).abs().max())  # type: ignore[assignment]
    return error


def _relative_norm(found: list[Tensor], expected: list[Tensor]) -> float:
    """The norm of the errors over that of the logits around their mean."""
    exact = torch.stack(expected)
    around = exact - exact.mean(-1, keepdim=True)
    error: float = to_host((torch.stack(found) - exact).norm() / around.norm())  # type: ignore[assignment]
    return error
