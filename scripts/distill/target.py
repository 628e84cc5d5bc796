"""The target as it is served: what its text opens with, sampling that text, and labelling it."""

from collections.abc import Callable
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from decoding import load_model_pair
from decoding.token_tree import TokenTree
from scripts.distill.errors import DistillError
from scripts.distill.text import STORED_TOKENS, Text

ROWS = 64  # sequences sampled at once, and in one file
SEQUENCE_TOKENS = 224
SHORTEST_SEQUENCE = 8
TEMPERATURES = (0.8, 1.0)  # one half of the rows each
_USER_TEXT = "\N{WHITE SMALL SQUARE}USER\N{WHITE SMALL SQUARE}"


def split_source(target: str) -> tuple[str, str | None]:
    """Folder or hub id, and the file in it where it is GGUF."""
    path = Path(target)
    return (str(path.parent), path.name) if path.suffix == ".gguf" else (target, None)


class Target:
    """A target loaded through the engine, with the float16 linear layers it is served with on CPUs.

    Raises:
        ModelLoadError: the model cannot be loaded or served.
        DistillError: it has nothing to open a text with, or too short a context.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        pair = load_model_pair(source, None, max_num_seqs=1)
        name, gguf_file = split_source(source)
        extra = {"gguf_file": gguf_file} if gguf_file else {}
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **extra)
        self.opening = opening_ids(self.tokenizer)
        self.device, self.vocab_size = pair.device, pair.vocab_size
        self.special_ids = special_ids(self.tokenizer, pair.eos_token_ids, pair.vocab_size)
        self.longest_sequence = pair.max_model_len - len(self.opening)
        if self.longest_sequence < SHORTEST_SEQUENCE:
            raise DistillError(
                f"{source}: its context of {pair.max_model_len} tokens is too short to train on"
            )


class Writer:
    """Samples and labels sequences of `num_tokens` behind the target's opening."""

    def __init__(self, target: Target, num_tokens: int) -> None:
        self._opening = target.opening
        self._num_tokens = num_tokens
        context = len(self._opening) + num_tokens
        self._model = load_model_pair(target.source, None, max_model_len=context, max_num_seqs=ROWS).target

    @torch.inference_mode()
    def sample(self, seed: int, advance: Callable[[int], None]) -> Text:
        """`ROWS` sequences, drawn from the likeliest tokens with both temperatures.

        `advance` is called with the number of tokens done after every position.
        """
        model, rows = self._model, slice(0, ROWS)
        generator = torch.Generator().manual_seed(seed)
        temperatures = torch.tensor(TEMPERATURES).repeat_interleave(-(-ROWS // len(TEMPERATURES)))[
            :ROWS, None
        ]
        self._open_rows()
        roots = torch.full((ROWS,), self._opening[-1], device=model.device)
        ids, tops, log_probs = [], [], []
        for position in range(self._num_tokens):
            length = len(self._opening) - 1 + position
            model.cache.lengths[rows] = [length] * ROWS
            lengths = torch.full((ROWS,), length, device=model.device)
            logits = model.forward(rows, lengths, TokenTree.of_roots(roots, 1))[:, 0]
            top_log_probs, top_ids = _likeliest(logits)
            weights = (top_log_probs / temperatures).softmax(-1)
            chosen = top_ids.gather(1, torch.multinomial(weights, 1, generator=generator))[:, 0]
            roots = chosen.to(model.device)
            ids.append(chosen)
            tops.append(top_ids)
            log_probs.append(top_log_probs.half())
            advance(ROWS)
        return Text(*(torch.stack(each, dim=1) for each in (ids, tops, log_probs)))

    @torch.inference_mode()
    def label(self, token_ids: Tensor, advance: Callable[[int], None]) -> Text:
        """`token_ids` `[sequences, tokens]` with what the target thinks at each position."""
        tops, log_probs = [], []
        for sequence in token_ids.tolist():
            self._model.cache.lengths[0] = 0
            logits = self._model.prefill(0, [*self._opening, *sequence[:-1]], keep=len(sequence))
            values, top_ids = _likeliest(logits)
            tops.append(top_ids)
            log_probs.append(values.half())
            advance(len(sequence))
        return Text(token_ids, torch.stack(tops), torch.stack(log_probs))

    def _open_rows(self) -> None:
        """Put all of the opening but its last token into every row."""
        cache = self._model.cache
        cache.lengths[0] = 0
        if len(self._opening) > 1:
            self._model.prefill(0, self._opening[:-1])
        for row in range(1, ROWS):
            cache.move_row(0, row)


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and ids `[..., stored]` of the likeliest tokens of `[..., vocab]`, on the host."""
    values, ids = logits.topk(min(STORED_TOKENS, logits.shape[-1]), dim=-1)
    return (values - logits.logsumexp(-1, keepdim=True)).cpu(), ids.cpu()


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What every sampled text opens with: the chat template up to the user's words, else BOS.

    The model then invents the user's question first and answers it.

    Raises:
        DistillError: there is neither a template nor a BOS or EOS token.
    """
    ids = tokenizer.encode(_template_opening(tokenizer), add_special_tokens=False)
    if ids:
        return list(ids)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise DistillError("the target has no chat template, BOS or EOS token to start a text with; set one")
    return [int(start)]


def _template_opening(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        return ""
    try:
        messages = [{"role": "user", "content": _USER_TEXT}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError):
        return ""
    before, found, _ = text.partition(_USER_TEXT)
    return before if found else ""


def special_ids(
    tokenizer: PreTrainedTokenizerBase, eos_token_ids: tuple[int, ...], vocab_size: int
) -> list[int]:
    """Ids that a cut head must keep: everything the tokenizer calls special, and all ends."""
    added = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    found = {*tokenizer.all_special_ids, *added, *eos_token_ids}
    return sorted(each for each in found if each < vocab_size)
