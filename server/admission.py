"""From a valid request to the commands that serve it: all checks that need the loaded pair."""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from decoding import GREEDY_TEMPERATURE, DecodingConfig, SamplingParams
from server.chat import ChatTemplate
from server.chat_schemas import ChatMessage, ChatRequest, conversation
from server.choice_text import Prefix
from server.config import ServerConfig
from server.errors import InvalidRequestError
from server.messages import GenerateCommand, ReadyEvent
from server.schemas import CompletionRequest, GenerationRequest
from server.speculation import Speculation
from server.text import TextCodec
from server.validation import unsupported

DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Job:
    """One admitted request: `commands` and `prefixes` (echoed prompts) have one entry per prompt."""

    id: str
    request: GenerationRequest
    served_model: str
    decoding: DecodingConfig
    seed: int
    commands: list[GenerateCommand]
    prefixes: Sequence[Prefix | None]
    arrived: float


class Admission:
    """Checks requests against one configuration and one loaded pair.

    Requests of one `cache_salt` may share columns of the caches.
    """

    def __init__(
        self,
        config: ServerConfig,
        model: ReadyEvent,
        codec: TextCodec,
        template: ChatTemplate | None = None,
        cache_salt: str = "",
    ) -> None:
        self._config = config
        self._model = model
        self._codec = codec
        self._template = template
        self._cache_salt = cache_salt

    async def admit(self, request: CompletionRequest, *, arrived: float) -> Job:
        """Raises InvalidRequestError."""
        served_model, decoding = self._method(request)
        self._check_log_probs(request)
        params = self._params(request, _or(request.max_tokens, DEFAULT_MAX_TOKENS))
        prompts = await self.encode(request.prompts, params.max_tokens)
        job_id = f"cmpl-{secrets.token_hex(16)}"
        prefixes: list[Prefix | None] = [None] * len(prompts)
        if request.echoes:
            prefixes = await asyncio.to_thread(self._prefixes, request, prompts)
        commands = self._commands(job_id, request, prompts, params, decoding)
        return Job(job_id, request, served_model, decoding, params.seed, commands, prefixes, arrived)

    async def admit_chat(self, request: ChatRequest, *, arrived: float) -> Job:
        """Without a limit the answer may fill the context. Raises InvalidRequestError."""
        served_model, decoding = self._method(request)
        wanted = request.limit
        prompt_ids = await self.encode_chat(request.messages, max_tokens=_or(wanted, 1))
        room = self._model.max_model_len - len(prompt_ids)
        params = self._params(request, _or(wanted, room))
        job_id = f"chatcmpl-{secrets.token_hex(16)}"
        commands = self._commands(job_id, request, [prompt_ids], params, decoding)
        return Job(job_id, request, served_model, decoding, params.seed, commands, [None], arrived)

    async def encode_chat(
        self,
        messages: list[ChatMessage],
        *,
        max_tokens: int = 0,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Token ids of a conversation, as the model's own template writes it."""
        if self._template is None:
            raise unsupported("messages", "the model has no chat template, use /v1/completions")
        text = await asyncio.to_thread(
            self._template.render, conversation(messages), add_generation_prompt=add_generation_prompt
        )
        (prompt_ids,) = await self.encode(
            [text], max_tokens, param="messages", add_special_tokens=add_special_tokens
        )
        return prompt_ids

    async def encode(
        self,
        prompts: list[str] | list[list[int]],
        max_tokens: int,
        *,
        param: str = "prompt",
        add_special_tokens: bool = True,
    ) -> list[list[int]]:
        """Token ids of every prompt, each within the context together with `max_tokens`.

        Raises InvalidRequestError.
        """
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        for text in texts:
            self._check_length(self._codec.fewest_tokens(text), max_tokens, param, at_least=True)
        if texts:
            token_lists = await self._codec.encode(texts, add_special_tokens=add_special_tokens)
        else:
            token_lists = [prompt for prompt in prompts if isinstance(prompt, list)]
        for token_ids in token_lists:
            self._check_length(len(token_ids), max_tokens, param)
            self.check_ids(param, token_ids)
        return [token_ids or [self._first_token(param)] for token_ids in token_lists]

    def served_model(self, name: str) -> str:
        """The id under which a name is served and counted; raises InvalidRequestError."""
        if name == self._config.target_id or name in self._config.target_aliases:
            return self._config.target_id
        if name == self._config.draft_id:
            return name
        raise model_not_found()

    def check_ids(self, param: str, token_ids: Sequence[int]) -> None:
        """Raises InvalidRequestError."""
        if token_ids and max(token_ids) >= self._model.vocab_size:
            last = self._model.vocab_size - 1
            message = f"'{param}' holds a token id beyond the vocabulary: ids are 0 to {last}."
            raise InvalidRequestError(message, code="invalid_value", param=param)

    def _method(self, request: GenerationRequest) -> tuple[str, DecodingConfig]:
        served_model = self.served_model(request.model)
        speculation = Speculation(self._config, has_draft=self._model.has_draft)
        off = request.speculative is False
        greedy = _temperature(request) < GREEDY_TEMPERATURE
        seeded = request.seed is not None or self._config.seed is not None
        decoding = speculation.resolve(request.options, served_model, off=off, greedy=greedy, seeded=seeded)
        return served_model, decoding

    def _commands(
        self,
        job_id: str,
        request: GenerationRequest,
        prompts: list[list[int]],
        params: SamplingParams,
        decoding: DecodingConfig,
    ) -> list[GenerateCommand]:
        n = request.num_candidates
        return [
            GenerateCommand(
                id=f"{job_id}-{index}",
                prompt_ids=prompt_ids,
                params=params,
                config=decoding,
                n=n,
                choice_offset=index * n,
                confirm_end=bool(request.stops),
                cache_salt=self._cache_salt,
            )
            for index, prompt_ids in enumerate(prompts)
        ]

    def _seed(self, request: GenerationRequest) -> int:
        if request.seed is not None:
            return request.seed
        return secrets.randbits(63) if self._config.seed is None else self._config.seed

    def _params(self, request: GenerationRequest, max_tokens: int) -> SamplingParams:
        vocab_size = self._model.vocab_size
        _at_most("top_k", request.top_k, vocab_size, "the size of the vocabulary")
        self.check_ids("stop_token_ids", request.stop_token_ids or ())
        self.check_ids("logit_bias", [token_id for token_id, _ in request.biases])
        _at_most("min_tokens", request.min_tokens, max_tokens, "as 'max_tokens'", code="invalid_value")
        top = request.num_top_log_probs
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_temperature(request),
            top_k=max(_or(request.top_k, 0), 0),
            top_p=_or(request.top_p, 1.0),
            min_p=_or(request.min_p, 0.0),
            seed=self._seed(request),
            stop_token_ids=tuple(request.stop_token_ids or ()),
            ignore_eos=_or(request.ignore_eos, False),
            min_tokens=_or(request.min_tokens, 0),
            presence_penalty=_or(request.presence_penalty, 0.0),
            frequency_penalty=_or(request.frequency_penalty, 0.0),
            repetition_penalty=_or(request.repetition_penalty, 1.0),
            logit_bias=request.biases,
            num_top_log_probs=min(_or(top, 0), vocab_size),
            prompt_log_probs=request.echoes and top is not None,
        )

    def _check_log_probs(self, request: CompletionRequest) -> None:
        limit = self._config.max_logprobs
        _at_most("logprobs", request.logprobs, limit, "the server's --max-logprobs")

    def _prefixes(self, request: CompletionRequest, token_lists: list[list[int]]) -> list[Prefix | None]:
        skip = request.skip_special_tokens is not False
        texts = [prompt if isinstance(prompt, str) else None for prompt in request.prompts]
        return [
            Prefix.of(self._codec, text, token_ids, skip_special_tokens=skip)
            for text, token_ids in zip(texts, token_lists, strict=True)
        ]

    def _first_token(self, param: str) -> int:
        """Where an empty prompt starts from."""
        for token_id in (self._model.bos_token_id, *self._model.eos_token_ids):
            if token_id is not None:
                return token_id
        message = f"'{param}' must not be empty: this model has no token to start from."
        raise InvalidRequestError(message, code="invalid_value", param=param)

    def _check_length(self, num_prompt: int, max_tokens: int, param: str, *, at_least: bool = False) -> None:
        context = self._model.max_model_len
        if max(num_prompt, 1) + max_tokens <= context:
            return
        counted = f"at least {num_prompt}" if at_least else str(num_prompt)
        message = (
            f"this model's maximum context length is {context} tokens, but the request asks for {counted} "
            f"in the prompt plus {max_tokens} in 'max_tokens': shorten the prompt or lower 'max_tokens'."
        )
        param = "max_tokens" if max_tokens >= context else param
        raise InvalidRequestError(message, code="context_length_exceeded", param=param)


def model_not_found() -> InvalidRequestError:
    message = "The model in 'model' does not exist here: GET /v1/models lists the ids."
    return InvalidRequestError(message, code="model_not_found", param="model", status=404)


def _at_most(
    param: str, value: int | None, maximum: int, what: str, *, code: str = "integer_above_max_value"
) -> None:
    if value is not None and value > maximum:
        message = f"'{param}' must be at most {maximum}, {what}."
        raise InvalidRequestError(message, code=code, param=param)


T = TypeVar("T")


def _temperature(request: GenerationRequest) -> float:
    return _or(request.temperature, 1.0)


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
