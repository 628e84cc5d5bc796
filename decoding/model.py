"""One causal language model with its rows of cache."""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from decoding.attention import ATTENTION_NAME, fold_mask, register_attention
from decoding.config import MAX_TREE_NODES
from decoding.graphs import PassGraphs, Recorder
from decoding.kv_cache import KVCache
from decoding.passes import Pass
from decoding.timing import PassTimer
from decoding.token_tree import TokenTree


class CausalModel:
    """A stock model that reads and writes rows of one preallocated cache.

    `module` is any transformers causal model; `rows` how many sequences fit, `max_model_len` tokens
    each. Log-probabilities are taken over the first `vocab_size` logits. Where the head is cut to part
    of the vocabulary, `output_ids` `[outputs]` are the token ids of its rows; other logits are -inf.
    `make_cache` allocates the cache.
    """

    ranks = 1  # processes that hold the model

    def __init__(
        self,
        module: PreTrainedModel,
        *,
        rows: int,
        max_model_len: int,
        vocab_size: int,
        device: torch.device,
        output_ids: Tensor | None = None,
        make_cache: Callable[..., KVCache] = KVCache,
    ) -> None:
        register_attention()
        self.module: PreTrainedModel = nn.Module.to(module, device)
        self.module.set_attn_implementation(ATTENTION_NAME)
        self.device = device
        self.timer = PassTimer(device)
        self.vocab_size = vocab_size
        self.output_ids = None if output_ids is None else output_ids.to(device)
        self.max_model_len = max_model_len
        config = module.config.get_text_config()
        self.dtype = module.dtype
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.cache = make_cache(
            layers=config.num_hidden_layers,
            rows=rows,
            kv_heads=kv_heads,
            capacity=max_model_len + 1 + MAX_TREE_NODES,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=self.dtype,
            device=device,
        )
        self._groups = config.num_attention_heads // kv_heads
        self._layer_types = set(getattr(config, "layer_types", None) or ())
        self._window: int | None = getattr(config, "sliding_window", None)
        names = inspect.signature(module.forward).parameters
        self._cache_keyword = "cache" if "cache" in names else "past_key_values"
        self.graphs: PassGraphs | None = None

    def use_graphs(self, recorder: Recorder) -> PassGraphs:
        """From now on replay the passes of trees, whose shapes are few, from graphs of `recorder`."""
        self.graphs = PassGraphs(
            self._logits, self.cache, recorder, vocab_size=self.vocab_size, dtype=self.dtype
        )
        return self.graphs

    @torch.inference_mode()
    def prefill(self, row: int, token_ids: list[int], *, keep: int = 1) -> Tensor:
        """Append `token_ids` to the committed columns of one row; logits `[keep, vocab]` of the last ones."""
        start = self.cache.lengths[row]
        rows = slice(row, row + 1)
        live = self.cache.live_length(rows, len(token_ids))
        columns = torch.arange(start, start + len(token_ids), device=self.device)[None]
        keys = torch.arange(live, device=self.device)
        logits = self._run(
            rows,
            Pass(
                token_ids=torch.tensor([token_ids], device=self.device),
                columns=columns,
                positions=columns,
                mask=keys <= columns[:, :, None],
                key_positions=keys[None],
            ),
            keep=keep,
        )
        self.cache.lengths[row] = start + len(token_ids)
        return logits[0]

    def forward(
        self,
        rows: slice,
        lengths: Tensor,
        tree: TokenTree,
        *,
        first: int = 0,
        count: int | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """Run `count` nodes of `tree` from node `first` on; earlier nodes must have been run already.

        `lengths` `[rows]` are committed columns on the device. Returns logits `[rows, count, vocab]`, or
        only those of the last `keep` nodes, in memory that the model's next pass may use again.
        """
        end = tree.num_nodes if count is None else first + count
        live = self._live_length(rows, tree.num_nodes)
        nodes = torch.arange(end, device=self.device)
        columns = lengths[:, None] + nodes
        keys = torch.arange(live, device=self.device)
        ancestors = tree.ancestors[:, first:end, :end]
        mask = (keys < lengths[:, None])[:, None, :].repeat(1, end - first, 1)
        mask.scatter_(2, columns[:, None, :].expand(-1, end - first, -1), ancestors)
        # Nodes that are only padding may lie behind the context, where learned positions end.
        positions = (lengths[:, None] + tree.depths[:, :end]).clamp(max=self.max_model_len - 1)
        run = self._replay if keep is None else self._run  # gaps are of any length, so of any shape
        return run(
            rows,
            Pass(
                token_ids=tree.token_ids[:, first:end],
                columns=columns[:, first:],
                positions=positions[:, first:],
                mask=mask,
                key_positions=keys.repeat(len(lengths), 1).scatter_(1, columns, positions),
            ),
            keep=keep or end - first,
        )

    def catch_up(self, rows: slice, lengths: Tensor, last_tokens: Tensor) -> Tensor:
        """Run the last committed token again and then the root; logits `[rows, vocab]` of the root.

        The draft never ran the deepest level of its own tree, so the last committed column may be
        missing; running it always keeps the shape fixed at two tokens. The memory is as in `forward`.
        """
        live = self._live_length(rows, 1)
        before = (lengths - 1).clamp(min=0)
        positions = torch.stack([before, lengths], dim=1)
        first_column = torch.where(lengths > 0, before, self.cache.trash_column)
        keys = torch.arange(live, device=self.device)
        logits = self._replay(
            rows,
            Pass(
                token_ids=last_tokens,
                columns=torch.stack([first_column, lengths], dim=1),
                positions=positions,
                mask=keys <= positions[:, :, None],
                key_positions=keys.repeat(len(lengths), 1),
            ),
            keep=1,
        )
        return logits[:, 0]

    def commit(self, rows: slice, lengths: Tensor, path: Tensor) -> None:
        """Move the accepted nodes `path` `[rows, depth]` (0 beyond their end) right behind their root."""
        depths = torch.arange(1, path.shape[1] + 1, device=self.device)
        sources = lengths[:, None] + torch.where(path > 0, path, depths)
        self.cache.commit(rows, sources, lengths[:, None] + depths.expand_as(path))

    @torch.inference_mode()
    def plain_logits(self, token_ids: list[int]) -> Tensor:
        """The last logits of one text by a stock forward without any cache, as the head gives them."""
        self.module.set_attn_implementation("eager")
        try:
            input_ids = torch.tensor([token_ids], device=self.device)
            logits: Tensor = self.module(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits
        finally:
            self.module.set_attn_implementation(ATTENTION_NAME)
        return logits[0, -1, : self.vocab_size].float()

    def _live_length(self, rows: slice, num_new: int) -> int:
        live = self.cache.live_length(rows, num_new)
        return live if self.graphs is None else self.graphs.live_length(live)

    def _replay(self, rows: slice, inputs: Pass, keep: int) -> Tensor:
        """The pass from its graph, where it has one."""
        graph = None if self.graphs is None else self.graphs.find(rows, inputs, keep)
        if graph is None:
            return self._run(rows, inputs, keep)
        with self.timer.passing():
            return graph.replay(rows, inputs)

    def _run(self, rows: slice, inputs: Pass, keep: int) -> Tensor:
        with self.timer.passing():
            logits = self._logits(rows, inputs, keep)
        return logits if logits.dtype == torch.float64 else logits.float()

    @torch.no_grad()
    def _logits(self, rows: slice, inputs: Pass, keep: int) -> Tensor:
        self.cache.begin_pass(rows, inputs.columns, inputs.mask.shape[-1])
        output = self.module(
            input_ids=inputs.token_ids,
            position_ids=inputs.positions,
            attention_mask=self._masks(inputs),
            use_cache=True,
            logits_to_keep=keep,
            **{self._cache_keyword: self.cache},
        )
        logits: Tensor = output.logits[:, -keep:, : self.vocab_size]
        return logits if self.output_ids is None else self._spread(logits, self.output_ids)

    def _spread(self, logits: Tensor, output_ids: Tensor) -> Tensor:
        """A cut head's logits `[..., outputs]` in the shared vocabulary, -inf where it has no row."""
        # A state that is not a number must show in every logit, as it does with a full head.
        outside = torch.where(logits[..., :1] < math.inf, -math.inf, math.nan).to(logits.dtype)
        spread = outside.repeat(1, 1, self.vocab_size)
        return spread.scatter_(-1, output_ids.expand_as(logits), logits)

    def _masks(self, inputs: Pass) -> Tensor | dict[str, Tensor]:
        """The additive mask, or one per layer type where only some layers have a sliding window."""
        full = fold_mask(inputs.mask, self._groups, self.dtype)
        if self._window is None or self._layer_types == {"full_attention"}:
            return full
        near = inputs.positions[:, :, None] - inputs.key_positions[:, None, :] < self._window
        windowed = fold_mask(inputs.mask & near, self._groups, self.dtype)
        if "full_attention" in self._layer_types or "sliding_attention" in self._layer_types:
            return {"full_attention": full, "sliding_attention": windowed}
        return windowed
