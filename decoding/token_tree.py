"""A batch of token trees: what a draft proposes and a target verifies in one pass.

Node 0 is the root, the last sampled token, which is not cached yet. Nodes are numbered parents
first. A padding node has `draft_log_probs` -inf, can never be accepted and is never an ancestor.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class TokenTree:
    """Trees of several rows with the same number of nodes; all tensors `[rows, nodes]` but `ancestors`.

    `depths` are real depths (root 0), `draft_log_probs` (float64) the joint log q of each node's path, nats,
    `ended` marks nodes whose token ends the sequence, `ancestors` `[rows, nodes, nodes]` is true where
    the second node lies on the first one's path, itself and the root included. `finite` `[rows]` is
    false where the draft gave values that are not numbers.
    """

    token_ids: Tensor
    parents: Tensor
    depths: Tensor
    draft_log_probs: Tensor
    ended: Tensor
    ancestors: Tensor
    finite: Tensor

    @classmethod
    def of_roots(cls, roots: Tensor, num_nodes: int) -> "TokenTree":
        """Trees `[rows, num_nodes]` that hold only their roots `[rows]`; the rest is padding."""
        rows, device = roots.shape[0], roots.device
        token_ids = roots[:, None].repeat(1, num_nodes)
        parents = torch.zeros(rows, num_nodes, dtype=torch.long, device=device)
        draft_log_probs = torch.full((rows, num_nodes), -math.inf, dtype=torch.float64, device=device)
        draft_log_probs[:, 0] = 0.0
        ancestors = torch.eye(num_nodes, dtype=torch.bool, device=device).repeat(rows, 1, 1)
        ancestors[:, :, 0] = True
        return cls(
            token_ids=token_ids,
            parents=parents,
            depths=torch.zeros_like(parents),
            draft_log_probs=draft_log_probs,
            ended=torch.zeros(rows, num_nodes, dtype=torch.bool, device=device),
            ancestors=ancestors,
            finite=torch.ones(rows, dtype=torch.bool, device=device),
        )

    @classmethod
    def chain_of(cls, token_ids: Tensor) -> "TokenTree":
        """Chains of known tokens `[rows, tokens]`, the first of which is the root."""
        num_nodes = token_ids.shape[1]
        chain = cls.of_roots(token_ids[:, 0], num_nodes)
        chain.token_ids = token_ids
        numbers = torch.arange(num_nodes, device=token_ids.device)
        chain.depths = numbers.expand_as(token_ids)
        chain.parents = (chain.depths - 1).clamp(min=0)
        chain.ancestors = (numbers <= numbers[:, None]).expand(len(token_ids), -1, -1)
        return chain

    @property
    def num_nodes(self) -> int:
        return self.token_ids.shape[1]

    def add_level(
        self,
        first: int,
        depth: int,
        *,
        token_ids: Tensor,
        parents: Tensor,
        draft_log_probs: Tensor,
        ended: Tensor,
    ) -> None:
        """Write nodes `first` onwards, all at `depth`; arguments `[rows, width]`, -inf marks padding."""
        nodes = slice(first, first + token_ids.shape[1])
        self.token_ids[:, nodes] = token_ids
        self.parents[:, nodes] = parents
        self.depths[:, nodes] = depth
        self.draft_log_probs[:, nodes] = draft_log_probs
        self.ended[:, nodes] = ended
        index = parents[:, :, None].expand(-1, -1, self.num_nodes)
        self.ancestors[:, nodes] |= self.ancestors.gather(1, index)

    def note_finite(self, logits: Tensor) -> None:
        """Remember rows whose draft `logits` `[rows, nodes, vocab]` come from states that are not numbers."""
        # Such a state makes every logit of its node NaN, so one of them tells; -inf only excludes a token.
        self.finite = self.finite & (logits[:, :, 0] < math.inf).all(1)

    def path(self, nodes: Tensor, depth: int) -> Tensor:
        """The nodes `[rows, depth]` at depth 1, 2, ... on the way to `nodes` `[rows]`, 0 beyond their end."""
        index = nodes[:, None, None].expand(-1, 1, self.num_nodes)
        on_path = self.ancestors.gather(1, index)
        levels = torch.arange(1, depth + 1, device=nodes.device)
        at_level = on_path & (self.depths[:, None, :] == levels[None, :, None])
        return at_level.int().argmax(-1)

    def chain(self, path: Tensor) -> "TokenTree":
        """The trees that hold only `path` `[rows, depth]` (from `path()`); shorter ones are padded."""
        chain = TokenTree.of_roots(self.token_ids[:, 0], path.shape[1] + 1)
        chain.finite = self.finite
        real = path > 0
        for depth in range(1, path.shape[1] + 1):
            node = path[:, depth - 1 : depth]
            chain.add_level(
                depth,
                depth,
                token_ids=self.token_ids.gather(1, node),
                parents=torch.full_like(node, depth - 1),
                draft_log_probs=self.draft_log_probs.gather(1, node).masked_fill_(
                    ~real[:, depth - 1 : depth], -math.inf
                ),
                ended=self.ended.gather(1, node) & real[:, depth - 1 : depth],
            )
        return chain

    def pruned(self, budget: int) -> tuple["TokenTree", Tensor]:
        """The root and the `budget` nodes of highest joint q, and their numbers `[rows, nodes]` in this tree.

        A path's q never rises, and the sort is stable over nodes numbered parents first, so a node that
        is kept has kept its parent, equal scores too.
        """
        kept = self.draft_log_probs.sort(dim=1, descending=True, stable=True).indices[:, : 1 + budget]
        places = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        place_of = torch.zeros_like(self.parents).scatter_(1, kept, places)
        rows = kept[:, :, None].expand(-1, -1, self.num_nodes)
        columns = kept[:, None, :].expand(-1, kept.shape[1], -1)
        tree = TokenTree(
            token_ids=self.token_ids.gather(1, kept),
            parents=place_of.gather(1, self.parents.gather(1, kept)),
            depths=self.depths.gather(1, kept),
            draft_log_probs=self.draft_log_probs.gather(1, kept),
            ended=self.ended.gather(1, kept),
            ancestors=self.ancestors.gather(1, rows).gather(2, columns),
            finite=self.finite,
        )
        return tree, kept

    def joint(self, conditional: Tensor) -> Tensor:
        """Sum of `conditional` `[rows, nodes]` over each node's path, its root left out."""
        along = torch.where(self.ancestors, conditional[:, None, :], 0.0)
        return along[:, :, 1:].sum(-1)


def gather_at(values: Tensor, nodes: Tensor) -> Tensor:
    """`values[row, nodes[row]]`: `[rows, nodes, ...]` and `[rows]` to `[rows, ...]`."""
    return values[torch.arange(nodes.shape[0], device=nodes.device), nodes]
