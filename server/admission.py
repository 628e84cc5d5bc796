"""From a valid request to the commands that serve it: all checks that need the loaded pair."""

import secrets
from dataclasses import dataclass
from typing import Any, TypeVar

from decoding import MAX_TREE_NODES, DecodingConfig, SamplingParams
from server.config import ServerConfig
from server.errors import InvalidRequestError
from server.messages import GenerateCommand, ReadyEvent
from server.schemas import CompletionRequest, SpeculativeOptions
from server.text import TextCodec
from server.validation import unsupported

TREE_KEYS = ("num_speculative_tokens", "beam_width", "acceptance_threshold", "acceptance_reference")
APPLIED_KEYS: dict[str, tuple[str, ...]] = {
    "target": (),
    "draft": (),
    "speculative": ("num_speculative_tokens",),
    "mtad": TREE_KEYS,
    "mmtad": TREE_KEYS,
}
DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Job:
    """One admitted request: `commands` has one entry per prompt."""

    id: str
    request: CompletionRequest
    served_model: str
    decoding: DecodingConfig
    seed: int
    commands: list[GenerateCommand]
    arrived: float

    @property
    def applied(self) -> dict[str, Any]:
        """`metrics.speculative`: the method and the keys that it uses."""
        method = self.decoding.method
        return {"method": method} | {key: getattr(self.decoding, key) for key in APPLIED_KEYS[method]}


class Admission:
    """Checks requests against one configuration and one loaded pair."""

    def __init__(self, config: ServerConfig, model: ReadyEvent, codec: TextCodec) -> None:
        self._config = config
        self._model = model
        self._codec = codec

    async def admit(self, request: CompletionRequest, *, arrived: float) -> Job:
        """Raises InvalidRequestError."""
        served_model = self._served_model(request.model)
        decoding = self._decoding(request, served_model)
        seed = self._seed(request)
        params = self._params(request, seed)
        prompts = await self._prompts(request, params.max_tokens)
        job_id = f"cmpl-{secrets.token_hex(16)}"
        commands = [
            GenerateCommand(
                id=f"{job_id}-{index}",
                prompt_ids=prompt_ids,
                params=params,
                config=decoding,
                n=request.num_choices,
                choice_offset=index * request.num_choices,
                confirm_end=bool(request.stops),
            )
            for index, prompt_ids in enumerate(prompts)
        ]
        return Job(job_id, request, served_model, decoding, seed, commands, arrived)

    def _served_model(self, name: str) -> str:
        """The id under which a name is served and counted."""
        if name == self._config.target_id or name in self._config.target_aliases:
            return self._config.target_id
        if name == self._config.draft_id:
            return name
        raise model_not_found()

    def _decoding(self, request: CompletionRequest, served_model: str) -> DecodingConfig:
        options = request.options
        method = options.method or self._config.decoding.method
        if served_model != self._config.target_id:
            if options.method not in (None, "draft"):
                param = "speculative" if request.speculative is False else "speculative.method"
                message = (
                    f"'{param}' must leave the method at 'draft' for the draft model: use the target's id."
                )
                raise InvalidRequestError(message, code="invalid_value", param=param)
            method = "draft"
        if method != "target" and not self._model.has_draft:
            raise unsupported("speculative.method", "no draft model is loaded, so only 'target' is served")
        return self._merge(options, method)

    def _merge(self, options: SpeculativeOptions, method: str) -> DecodingConfig:
        """The request's keys over the server's; a key that the method does not use changes nothing."""
        own = self._config.decoding
        used = APPLIED_KEYS[method]
        depth = options.num_speculative_tokens
        width = options.beam_width
        _at_most("num_speculative_tokens", depth, self._config.max_num_speculative_tokens)
        _at_most("beam_width", width, self._config.max_beam_width)
        if depth is None:
            depth = own.num_speculative_tokens if "num_speculative_tokens" in used else 1
        if width is None:
            width = own.beam_width if "beam_width" in used else 1
        if depth * width > MAX_TREE_NODES:
            message = (
                f"'speculative.beam_width' times 'speculative.num_speculative_tokens' is {depth * width} and "
                f"must be at most {MAX_TREE_NODES}: lower one of them."
            )
            raise InvalidRequestError(message, code="invalid_value", param="speculative.beam_width")
        threshold, reference = options.acceptance_threshold, options.acceptance_reference
        return DecodingConfig(
            method=method,  # type: ignore[arg-type]
            num_speculative_tokens=depth,
            beam_width=width,
            acceptance_threshold=own.acceptance_threshold if threshold is None else threshold,
            acceptance_reference=reference or own.acceptance_reference,
        )

    def _seed(self, request: CompletionRequest) -> int:
        if request.seed is not None:
            return request.seed
        return secrets.randbits(63) if self._config.seed is None else self._config.seed

    def _params(self, request: CompletionRequest, seed: int) -> SamplingParams:
        vocab_size = self._model.vocab_size
        if request.top_k is not None and request.top_k > vocab_size:
            message = f"'top_k' must be at most {vocab_size}, the size of the vocabulary."
            raise InvalidRequestError(message, code="integer_above_max_value", param="top_k")
        self._check_ids("stop_token_ids", request.stop_token_ids or [])
        return SamplingParams(
            max_tokens=_or(request.max_tokens, DEFAULT_MAX_TOKENS),
            temperature=_or(request.temperature, 1.0),
            top_k=max(_or(request.top_k, 0), 0),
            top_p=_or(request.top_p, 1.0),
            min_p=_or(request.min_p, 0.0),
            seed=seed,
            stop_token_ids=tuple(request.stop_token_ids or ()),
            ignore_eos=_or(request.ignore_eos, False),
        )

    async def _prompts(self, request: CompletionRequest, max_tokens: int) -> list[list[int]]:
        """Token ids of every prompt, each within the context together with `max_tokens`."""
        prompts = request.prompts
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        for text in texts:
            self._check_length(self._codec.fewest_tokens(text), max_tokens, at_least=True)
        if texts:
            token_lists = await self._codec.encode(texts)
        else:
            token_lists = [prompt for prompt in prompts if isinstance(prompt, list)]
        for token_ids in token_lists:
            self._check_length(len(token_ids), max_tokens)
            self._check_ids("prompt", token_ids)
        return [token_ids or [self._first_token()] for token_ids in token_lists]

    def _first_token(self) -> int:
        """Where an empty prompt starts from."""
        for token_id in (self._model.bos_token_id, *self._model.eos_token_ids):
            if token_id is not None:
                return token_id
        message = "'prompt' must not be empty: this model has no token to start from."
        raise InvalidRequestError(message, code="invalid_value", param="prompt")

    def _check_ids(self, param: str, token_ids: list[int]) -> None:
        if token_ids and max(token_ids) >= self._model.vocab_size:
            last = self._model.vocab_size - 1
            message = f"'{param}' holds a token id beyond the vocabulary: ids are 0 to {last}."
            raise InvalidRequestError(message, code="invalid_value", param=param)

    def _check_length(self, num_prompt: int, max_tokens: int, *, at_least: bool = False) -> None:
        context = self._model.max_model_len
        if max(num_prompt, 1) + max_tokens <= context:
            return
        counted = f"at least {num_prompt}" if at_least else str(num_prompt)
        message = (
            f"this model's maximum context length is {context} tokens, but the request asks for {counted} "
            f"in the prompt plus {max_tokens} in 'max_tokens': shorten the prompt or lower 'max_tokens'."
        )
        param = "max_tokens" if max_tokens >= context else "prompt"
        raise InvalidRequestError(message, code="context_length_exceeded", param=param)


def model_not_found() -> InvalidRequestError:
    message = "The model in 'model' does not exist here: GET /v1/models lists the ids."
    return InvalidRequestError(message, code="model_not_found", param="model", status=404)


def _at_most(key: str, value: int | None, maximum: int) -> None:
    if value is not None and value > maximum:
        message = f"'speculative.{key}' must be at most {maximum}."
        raise InvalidRequestError(message, code="integer_above_max_value", param=f"speculative.{key}")


T = TypeVar("T")


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
