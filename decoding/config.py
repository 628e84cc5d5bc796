"""How one request is decoded: the method and its numbers."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

MethodName = Literal["target", "draft", "speculative", "mtad", "mmtad"]
AcceptanceReference = Literal["draft", "target"]

METHODS: tuple[str, ...] = get_args(MethodName)
ACCEPTANCE_REFERENCES: tuple[str, ...] = get_args(AcceptanceReference)

MAX_SPECULATIVE_TOKENS = 16
MAX_BEAM_WIDTH = 16
MAX_TREE_NODES = 64  # beam_width * num_speculative_tokens, root apart


@dataclass(frozen=True, slots=True)
class DecodingConfig:
    """Method and preset of one sequence.

    `num_speculative_tokens` (gamma) is the depth proposed per step, `beam_width` (W) the live
    continuations per depth, `acceptance_threshold` (tau) the ratio of joint likelihoods above which
    a prefix is accepted, `acceptance_reference` what the target's joint likelihood is compared with.
    Keys that the method does not use are validated and have no effect.

    Raises:
        ValueError: a value outside its bounds; the message starts with the field's name.
    """

    method: MethodName = "mmtad"
    num_speculative_tokens: int = 4
    beam_width: int = 4
    acceptance_threshold: float = 0.5
    acceptance_reference: AcceptanceReference = "target"

    def __post_init__(self) -> None:
        _require(self.method in METHODS, f"method must be one of {', '.join(METHODS)}")
        _require_between("num_speculative_tokens", self.num_speculative_tokens, MAX_SPECULATIVE_TOKENS)
        _require_between("beam_width", self.beam_width, MAX_BEAM_WIDTH)
        _require(
            self.num_speculative_tokens * self.beam_width <= MAX_TREE_NODES,
            f"beam_width times num_speculative_tokens must be at most {MAX_TREE_NODES}",
        )
        _require(
            not math.isnan(self.acceptance_threshold) and self.acceptance_threshold >= 0,
            "acceptance_threshold must be 0 or more",
        )
        _require(
            self.acceptance_reference in ACCEPTANCE_REFERENCES,
            f"acceptance_reference must be one of {', '.join(ACCEPTANCE_REFERENCES)}",
        )

    @property
    def uses_target(self) -> bool:
        return self.method != "draft"

    @property
    def uses_draft(self) -> bool:
        return self.method != "target"

    @property
    def preset(self) -> tuple[MethodName, int, int]:
        """Rows with equal presets share one pass: method, depth, width (0 where unused)."""
        if self.method in ("target", "draft"):
            return self.method, 0, 0
        if self.method == "speculative":
            return self.method, self.num_speculative_tokens, 1
        return self.method, self.num_speculative_tokens, self.beam_width


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_between(field: str, value: int, maximum: int) -> None:
    _require(1 <= value <= maximum, f"{field} must be between 1 and {maximum}")
