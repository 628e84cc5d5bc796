"""Which method and which of its numbers a request gets: its own keys over the server's."""

from dataclasses import replace
from typing import Any

from decoding import ADAPTIVE_METHODS, DecodingConfig, default_threshold
from server.config import ServerConfig
from server.errors import InvalidRequestError
from server.schemas import SpeculativeOptions
from server.validation import unsupported

TREE_KEYS = ("num_speculative_tokens", "beam_width", "acceptance_threshold", "acceptance_reference")
NUMBERS = {"num_speculative_tokens", "beam_width", "acceptance_threshold"}
APPLIED_KEYS: dict[str, tuple[str, ...]] = {
    "target": (),
    "draft": (),
    "speculative": ("num_speculative_tokens", "acceptance"),
    "multi_candidate": ("candidates_per_level",),
    "mtjd": ("num_speculative_tokens", "beam_width"),
    "mtad": TREE_KEYS,
    "mmtad": TREE_KEYS,
}


def applied(decoding: DecodingConfig) -> dict[str, Any]:
    """`metrics.speculative`: the method and the keys that it uses."""
    keys = APPLIED_KEYS[decoding.method] + (("adaptive",) if decoding.method in ADAPTIVE_METHODS else ())
    return {"method": decoding.method} | {key: getattr(decoding, key) for key in keys}


def drafts(decoding: DecodingConfig) -> bool:
    """Whether a draft proposes and the target verifies."""
    return decoding.uses_draft and decoding.uses_target


class Speculation:
    """Resolves the speculative keys of requests against one configuration."""

    def __init__(self, config: ServerConfig, *, has_draft: bool) -> None:
        self._config = config
        self._has_draft = has_draft

    def resolve(
        self, options: SpeculativeOptions, served_model: str, *, off: bool, greedy: bool, seeded: bool
    ) -> DecodingConfig:
        """`off` is `speculative: false`, `greedy` temperature 0; raises InvalidRequestError.

        Where the shape of a step may follow the load, so may the text: a request with a seed, or with
        numbers of its own, is decoded with fixed ones throughout.
        """
        method = options.method or self._config.decoding.method
        if served_model != self._config.target_id:
            if options.method not in (None, "draft"):
                raise _only_draft("speculative" if off else "speculative.method")
            method = "draft"
        decoding = self._merge(options, method, greedy=greedy)
        if seeded or any(getattr(options, key) is not None for key in NUMBERS & {*APPLIED_KEYS[method]}):
            decoding = replace(decoding, adaptive=False)
        if decoding.uses_draft and not self._has_draft:
            raise unsupported("speculative.method", "no draft model is loaded: use 'target' or 'mtjd'")
        return decoding

    def _merge(self, options: SpeculativeOptions, method: str, *, greedy: bool) -> DecodingConfig:
        """A key that the method does not use changes nothing; one that was sent is checked all the same."""
        own, used = self._config.decoding, APPLIED_KEYS[method]
        _at_most("num_speculative_tokens", options.num_speculative_tokens, self._max_depth)
        _at_most("beam_width", options.beam_width, self._config.max_beam_width)
        depth, width = options.num_speculative_tokens, options.beam_width
        if depth is None:
            depth = own.num_speculative_tokens if "num_speculative_tokens" in used else 1
        if width is None:
            width = own.beam_width if "beam_width" in used else 1
        threshold = options.acceptance_threshold
        if threshold is None:
            threshold = self._config.speculative_config.acceptance_threshold
        if threshold is None:
            threshold = default_threshold(greedy=greedy)
        try:
            return DecodingConfig(
                method=method,  # type: ignore[arg-type]
                num_speculative_tokens=depth,
                beam_width=width,
                acceptance_threshold=threshold,
                acceptance_reference=options.acceptance_reference or own.acceptance_reference,
                acceptance=options.acceptance or own.acceptance,
                candidates_per_level=self._candidates(options) or own.candidates_per_level,
                adaptive=own.adaptive and method in ADAPTIVE_METHODS,
            )
        except ValueError as error:
            raise _invalid(str(error)) from None

    @property
    def _max_depth(self) -> int:
        return self._config.max_num_speculative_tokens

    def _candidates(self, options: SpeculativeOptions) -> tuple[int, ...]:
        candidates = options.candidates_per_level or []
        if len(candidates) > self._max_depth:
            message = f"'speculative.candidates_per_level' must have at most {self._max_depth} elements."
            param = "speculative.candidates_per_level"
            raise InvalidRequestError(message, code="array_above_max_length", param=param)
        return tuple(candidates)


def _only_draft(param: str) -> InvalidRequestError:
    message = f"'{param}' must leave the method at 'draft' for the draft model: use the target's id."
    return InvalidRequestError(message, code="invalid_value", param=param)


def _at_most(key: str, value: int | None, maximum: int) -> None:
    if value is not None and value > maximum:
        message = f"'speculative.{key}' must be at most {maximum}."
        raise InvalidRequestError(message, code="integer_above_max_value", param=f"speculative.{key}")


def _invalid(reason: str) -> InvalidRequestError:
    """What `DecodingConfig` refuses: bounds over several numbers. Its messages start with the key."""
    key, _, rule = reason.partition(" ")
    param = f"speculative.{key}"
    return InvalidRequestError(f"'{param}' {rule}: lower it.", code="invalid_value", param=param)
