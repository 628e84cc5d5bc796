"""What is known of one sequence: its tokens, its sampling parameters, how it ends."""

import math
from collections.abc import Sequence as Series
from dataclasses import dataclass, field
from enum import StrEnum

from decoding.config import DecodingConfig
from decoding.survival import SequenceSurvival

GREEDY_TEMPERATURE = 1e-5


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The request's own transforms of both models' distributions, and its ends.

    `temperature` under 1e-5 is greedy; `top_k` 0 and -1 mean off; `seed` is an int64.

    Raises:
        ValueError: a value outside its bounds; the message starts with the field's name.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_top_log_probs: int = 0
    prompt_log_probs: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ValueError("max_tokens must be 0 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError("temperature must be finite and 0 or more")
        if self.top_k < -1:
            raise ValueError("top_k must be -1 or more")
        if not 0 <= self.top_p <= 1:
            raise ValueError("top_p must be between 0 and 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError("min_p must be between 0 and 1")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError("seed must be a 64-bit signed integer")
        if self.min_tokens < 0:
            raise ValueError("min_tokens must be 0 or more")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError("repetition_penalty must be finite and above 0")
        if not all(math.isfinite(bias) for _, bias in self.logit_bias):
            raise ValueError("logit_bias must hold finite values")
        if self.num_top_log_probs < 0:
            raise ValueError("num_top_log_probs must be 0 or more")

    @property
    def adjusts_logits(self) -> bool:
        """Whether anything changes the logits before temperature."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1)
        return bool(self.logit_bias) or self.min_tokens > 0 or any(penalties)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE


@dataclass(slots=True)
class Sequence:
    """One sequence in the engine, from its prompt to its last token.

    `choice` is prompt index times n plus the index of the choice: with `params.seed` and
    `num_steps` it selects the random numbers of each step. A sequence that is resumed after a
    restart is given its delivered `output_ids` and the next unused `num_steps`. `arrival` is its number
    in the engine; `ran_out_of_memory` says that it was the youngest of a batch that was too large.
    `draft_lag` are the last cached tokens that the draft has not run, since the target went on alone;
    `survival` tells what the sequence's steps are expected to deliver. Columns are shared by sequences
    of equal `cache_salt` only; `num_reused` are the tokens of the prompt whose columns were there
    already, None until it is looked at.
    """

    id: str
    prompt_ids: list[int]
    params: SamplingParams
    config: DecodingConfig
    choice: int = 0
    output_ids: list[int] = field(default_factory=list)
    num_steps: int = 0
    arrival: int = 0
    ran_out_of_memory: bool = False
    draft_lag: int = 0
    survival: SequenceSurvival | None = None
    cache_salt: str = ""
    num_reused: int | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_cached(self) -> int:
        """Tokens a running sequence has in the cache: all but the root, its last one."""
        return self.num_tokens - 1

    @property
    def remaining(self) -> int:
        return self.params.max_tokens - len(self.output_ids)

    def last_tokens(self) -> tuple[int, int]:
        """The last committed token and the root; the root twice where nothing precedes it."""
        ids = self.output_ids if len(self.output_ids) > 1 else self.prompt_ids + self.output_ids
        return ids[max(len(ids) - 2, 0)], ids[-1]

    @property
    def prefills_draft(self) -> bool:
        """Whether the draft runs the prompt beside the target, or only once it is wanted."""
        return self.config.uses_draft and not self.draft_lag

    def draft_gap_ids(self) -> list[int]:
        """The tokens that the draft must run to have all cached ones but the last."""
        # The last cached token before the gap may be missing, too: nothing proposes before it is run again.
        end = self.num_cached - 1
        start = max(end - self.draft_lag, 0)
        return (self.prompt_ids + self.output_ids)[start:end] if self.draft_lag else []


TopLogProbs = tuple[tuple[int, float], ...]  # token ids with their log-probabilities, best first


@dataclass(frozen=True, slots=True)
class TokenLogProb:
    """One token's log-probability in nats, and the likeliest tokens at its place."""

    log_prob: float
    top: TopLogProbs


def top_log_probs(token_ids: Series[float], log_probs: Series[float]) -> TopLogProbs:
    """Pair numbers as they come from the device."""
    return tuple((int(token_id), value) for token_id, value in zip(token_ids, log_probs, strict=True))


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What one engine step delivered for one sequence.

    `log_probs` are in nats, of the untransformed target (for `draft`, of the draft); `top_log_probs`
    the likeliest tokens at each place, where they were asked for. `prompt_log_probs`, of the prompt
    from its second token on, come with the first output of a sequence that asked for them.
    `num_draft_tokens` is the depth proposed, `num_accepted_tokens` what the rule accepted, before
    truncation at an end: the first tokens of the step, the rest are the target's own. `preset` is the
    name of the step's shape, `num_reused` the sequence's.
    """

    id: str
    token_ids: list[int]
    log_probs: list[float]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_draft_tokens: int = 0
    num_draft_nodes: int = 0
    num_accepted_tokens: int = 0
    top_log_probs: list[TopLogProbs] | None = None
    prompt_log_probs: list[TokenLogProb] | None = None
    preset: str | None = None
    num_reused: int = 0


def empty_output(sequence: Sequence, prompt_log_probs: list[TokenLogProb] | None) -> SequenceOutput:
    """The output of a sequence that asked for no tokens."""
    if any(math.isnan(each.log_prob) for each in prompt_log_probs or ()):
        return SequenceOutput(sequence.id, [], [], finish_reason=FinishReason.ERROR)
    return SequenceOutput(
        sequence.id,
        [],
        [],
        finish_reason=FinishReason.LENGTH,
        prompt_log_probs=prompt_log_probs,
        num_reused=sequence.num_reused or 0,
    )
