"""How one request is decoded: the method and its numbers."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

MethodName = Literal["target", "draft", "speculative", "multi_candidate", "mtjd", "mtad", "mmtad"]
AcceptanceReference = Literal["draft", "target"]
Acceptance = Literal["token", "block"]

METHODS: tuple[str, ...] = get_args(MethodName)
ADAPTIVE_METHODS = ("speculative", "mtad", "mmtad")  # whose shape may change from step to step
ACCEPTANCE_REFERENCES: tuple[str, ...] = get_args(AcceptanceReference)
ACCEPTANCES: tuple[str, ...] = get_args(Acceptance)

MAX_SPECULATIVE_TOKENS = 16
MAX_BEAM_WIDTH = 16
MAX_TREE_NODES = 64  # beam_width * num_speculative_tokens, root apart
# From the frontier of quality against block efficiency (docs/decoding.md), at temperature 0 and above it.
GREEDY_THRESHOLD = 0.7
SAMPLING_THRESHOLD = 0.5
MAX_CANDIDATES = 16  # per level; the nodes of all levels are bounded by MAX_TREE_NODES


@dataclass(frozen=True, slots=True)
class Preset:
    """What rows must share to be decoded in one pass; a number that the method does not use is 0.

    `candidates` are the children per level of `multi_candidate`, `replacement` how they are drawn.
    `budget` is how many nodes of its tree `mmtad` verifies, the root apart; 0 for all. An `adaptive`
    one is not run itself: each step takes a shape of at most its depth and width, or none at all
    (depth 0: a plain step of the target).
    """

    method: str
    depth: int = 0
    width: int = 0
    acceptance: str = "token"
    candidates: tuple[int, ...] = ()
    replacement: bool = False
    budget: int = 0
    adaptive: bool = False

    @property
    def num_nodes(self) -> int:
        """Nodes that its step verifies, root included."""
        if self.candidates:
            return 1 + sum(math.prod(self.candidates[:depth]) for depth in range(1, self.depth + 1))
        return 1 + (self.budget or self.depth * self.width)

    @property
    def step_method(self) -> str:
        """The method whose step it is: `target` where nothing is proposed."""
        return "target" if self.method in ADAPTIVE_METHODS and not self.depth else self.method

    @property
    def name(self) -> str:
        """Short and unique: `target`, `mmtad-4x4` (depth, width), `mmtad-off`, `multi_candidate-4.2.2`..."""
        parts = [self.method]
        if self.candidates:
            parts.append(".".join(map(str, self.candidates)))
        elif self.depth:
            parts.append(f"{self.depth}x{self.width}")
        elif self.step_method != self.method:
            parts.append("off")
        if self.budget:
            parts.append(f"best{self.budget}")
        if self.adaptive:
            parts.append("adaptive")
        if self.acceptance != "token":
            parts.append(self.acceptance)
        if self.replacement:
            parts.append("replacement")
        return "-".join(parts)


def default_threshold(*, greedy: bool) -> float:
    """The `acceptance_threshold` of a sequence that has none of its own."""
    return GREEDY_THRESHOLD if greedy else SAMPLING_THRESHOLD


@dataclass(frozen=True, slots=True)
class DecodingConfig:
    """Method and preset of one sequence.

    `num_speculative_tokens` (gamma) is the depth proposed per step, `beam_width` (W) the live
    continuations per depth, `acceptance_threshold` (tau) the ratio of joint likelihoods above which
    a prefix is accepted, `acceptance_reference` what the target's joint likelihood is compared with.
    `acceptance` is how `speculative` verifies, `candidates_per_level` the children that
    `multi_candidate` draws for every node (its length is the depth), `replacement` whether it draws
    them independently. `adaptive` lets `speculative`, `mtad` and `mmtad` choose depth and width anew
    in every step, as far as the numbers here, by what they are expected to gain.
    Keys that the method does not use are validated and have no effect.

    Raises:
        ValueError: a value outside its bounds; the message starts with the field's name.
    """

    method: MethodName = "mmtad"
    num_speculative_tokens: int = 4
    beam_width: int = 4
    acceptance_threshold: float = SAMPLING_THRESHOLD
    acceptance_reference: AcceptanceReference = "target"
    acceptance: Acceptance = "token"
    candidates_per_level: tuple[int, ...] = (4, 2, 2)
    replacement: bool = False
    adaptive: bool = False

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
        _require(self.acceptance in ACCEPTANCES, f"acceptance must be one of {', '.join(ACCEPTANCES)}")
        self._check_candidates()

    def _check_candidates(self) -> None:
        candidates = self.candidates_per_level
        _require(
            1 <= len(candidates) <= MAX_SPECULATIVE_TOKENS,
            f"candidates_per_level must have 1 to {MAX_SPECULATIVE_TOKENS} levels",
        )
        _require(
            all(1 <= each <= MAX_CANDIDATES for each in candidates),
            f"candidates_per_level must hold numbers between 1 and {MAX_CANDIDATES}",
        )
        nodes = Preset("multi_candidate", len(candidates), candidates=candidates).num_nodes - 1
        _require(
            nodes <= MAX_TREE_NODES,
            f"candidates_per_level must give a tree of at most {MAX_TREE_NODES} nodes, not {nodes}",
        )

    @property
    def uses_target(self) -> bool:
        return self.method != "draft"

    @property
    def uses_draft(self) -> bool:
        return self.method not in ("target", "mtjd")

    @property
    def preset(self) -> Preset:
        """Rows with equal presets share one pass; an adaptive one stands for all shapes that it may take."""
        match self.method:
            case "target" | "draft":
                return Preset(self.method)
            case "speculative":
                return Preset(
                    self.method,
                    self.num_speculative_tokens,
                    1,
                    acceptance=self.acceptance,
                    adaptive=self.adaptive,
                )
            case "multi_candidate":
                candidates = self.candidates_per_level
                return Preset(
                    self.method, len(candidates), candidates=candidates, replacement=self.replacement
                )
        adaptive = self.adaptive and self.method in ADAPTIVE_METHODS
        return Preset(self.method, self.num_speculative_tokens, self.beam_width, adaptive=adaptive)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_between(field: str, value: int, maximum: int) -> None:
    _require(1 <= value <= maximum, f"{field} must be between 1 and {maximum}")
