"""The device state of the rows that share one pass, kept from step to step."""

import math
from collections.abc import Sequence as Series
from dataclasses import dataclass, field

import torch
from torch import Tensor

from decoding.adjustments import Adjustments
from decoding.config import Preset
from decoding.host import to_host
from decoding.sampler import RowSampling, step_streams, to_log_probs
from decoding.sequence import Sequence
from decoding.token_tree import TokenTree

NO_TOKEN = -1


@dataclass(slots=True)
class Batch:
    """Rows of one preset: where they stand and what each asked for.

    `lengths` `[rows]` are committed columns, so also the root's column; `last_tokens` `[rows, 2]` the
    last committed token and the root. `limits` `[rows]` is the depth that each row may propose in this
    step, `streams` `[rows]` what its random numbers are counted from. Built from the sequences when the
    group changes, advanced on the device by each step.
    """

    rows: slice
    preset: Preset
    lengths: Tensor
    last_tokens: Tensor
    steps: Tensor
    remaining: Tensor
    seeds: Tensor
    choices: Tensor
    end_ids: Tensor
    log_thresholds: Tensor
    target_reference: Tensor
    sampling: RowSampling
    adjustments: Adjustments | None
    num_top_log_probs: int
    limits: Tensor = field(init=False)
    streams: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._begin_step()

    @classmethod
    def of(
        cls,
        sequences: Series[Sequence],
        rows: slice,
        eos_token_ids: Series[int],
        vocab_size: int,
        device: torch.device,
    ) -> "Batch":
        configs = [sequence.config for sequence in sequences]
        end_ids = _end_ids(sequences, eos_token_ids, device)
        thresholds = [config.acceptance_threshold for config in configs]

        def integers(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        return cls(
            rows=rows,
            preset=sequences[0].config.preset,
            lengths=integers([sequence.num_cached for sequence in sequences]),
            last_tokens=torch.tensor([sequence.last_tokens() for sequence in sequences], device=device),
            steps=integers([sequence.num_steps for sequence in sequences]),
            remaining=integers([sequence.remaining for sequence in sequences]),
            seeds=integers([sequence.params.seed for sequence in sequences]),
            choices=integers([sequence.choice for sequence in sequences]),
            end_ids=end_ids,
            log_thresholds=torch.tensor(
                [math.log(t) if t > 0 else -math.inf for t in thresholds], device=device
            ),
            target_reference=torch.tensor(
                [config.acceptance_reference == "target" for config in configs], device=device
            ),
            sampling=RowSampling.of([sequence.params for sequence in sequences], vocab_size, device),
            adjustments=Adjustments.of(sequences, end_ids, vocab_size, device),
            num_top_log_probs=max(sequence.params.num_top_log_probs for sequence in sequences),
        )

    def take_shape(self, preset: Preset) -> None:
        """Decode the next step with another preset of the same method."""
        if preset != self.preset:
            self.preset = preset
            self._begin_step()

    @property
    def depth(self) -> int:
        return self.preset.depth

    @property
    def width(self) -> int:
        return self.preset.width

    @property
    def roots(self) -> Tensor:
        return self.last_tokens[:, 1]

    def _begin_step(self) -> None:
        """One token of a step is left for the target, which `mtjd` has no need of."""
        reserved = 0 if self.preset.method == "mtjd" else 1
        self.limits = (self.remaining - reserved).clamp(min=0, max=self.depth)
        self.streams = step_streams(self.seeds, self.choices, self.steps)

    def ends(self, token_ids: Tensor) -> Tensor:
        """Whether each of `token_ids` `[rows, tokens]` ends its sequence."""
        return (token_ids[:, :, None] == self.end_ids[:, None, :]).any(-1)

    def adjusted(self, logits: Tensor, tree: TokenTree, first: int = 0) -> Tensor:
        """Logits `[rows, nodes, vocab]` of nodes `first` onwards with each row's bias and penalties."""
        return logits if self.adjustments is None else self.adjustments.apply(logits, tree, first)

    def log_probs(self, logits: Tensor, tree: TokenTree, first: int = 0, *, point_mass: bool) -> Tensor:
        """The law at nodes `first` onwards after all of each row's transforms, as `to_log_probs`."""
        return to_log_probs(self.adjusted(logits, tree, first), self.sampling, point_mass=point_mass)

    def advance(self, delivered: Tensor, num_tokens: Tensor) -> None:
        """Take over `num_tokens` `[rows]` of `delivered` `[rows, most]`; the last one is the new root."""
        last = (num_tokens - 1).unsqueeze(1)
        known = torch.cat([self.roots[:, None], delivered], dim=1)
        self.last_tokens = known.gather(1, torch.cat([last, last + 1], dim=1))
        self.lengths = self.lengths + num_tokens
        self.remaining = self.remaining - num_tokens
        self.steps = self.steps + 1
        self._begin_step()
        if self.adjustments is not None:
            self.adjustments.advance(delivered, num_tokens)

    def check_integrity(self, sequences: Series[Sequence]) -> None:
        """Assert that the device holds what the sequences of its rows say."""
        state = torch.stack([self.lengths, self.steps, self.remaining, *self.last_tokens.unbind(1)], 1)
        expected = [[s.num_cached, s.num_steps, s.remaining, *s.last_tokens()] for s in sequences]
        assert to_host(state) == expected, (state, expected)
        if self.adjustments is not None:
            self.adjustments.check_integrity(sequences)


def sequence_end_ids(sequence: Sequence, eos_token_ids: Series[int]) -> frozenset[int]:
    """The ids that end a sequence: its stop ids, and EOS unless it is ignored."""
    eos = () if sequence.params.ignore_eos else eos_token_ids
    return frozenset(sequence.params.stop_token_ids) | frozenset(eos)


def _end_ids(sequences: Series[Sequence], eos_token_ids: Series[int], device: torch.device) -> Tensor:
    ends = [sorted(sequence_end_ids(sequence, eos_token_ids)) for sequence in sequences]
    most = max(1, *(len(ids) for ids in ends))
    padded = [ids + [NO_TOKEN] * (most - len(ids)) for ids in ends]
    return torch.tensor(padded, dtype=torch.long, device=device)
