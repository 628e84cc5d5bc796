"""One job on its way through the pool: its events become deltas of text, then a complete report."""

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from server.admission import Job
from server.choice_text import ChoiceText, Delta, Prefix, TextRules
from server.errors import OVERLOAD_MESSAGES, ApiError, InvalidRequestError, OverloadedError, ServerError
from server.messages import FailedEvent, FinishedEvent, GenerateCommand, StepEvent
from server.pool import WorkerPool
from server.report import Report, usage
from server.shapes import Shape
from server.text import Detokenizer, StopScanner, TextCodec

TARGET_ONLY = "-target-only"  # behind the fingerprint while a draft is off


class Generation:
    """An iterator of text deltas; `shape` says how they are written."""

    def __init__(self, pool: WorkerPool, job: Job, fingerprint: str, shape: Shape) -> None:
        assert pool.codec is not None
        self.job = job
        self.shape = shape
        self.codec: TextCodec = pool.codec
        self.report = Report(job)
        self._pool = pool
        self._created = int(time.time())
        self._fingerprint = fingerprint
        self._texts = {
            command.choice_offset + index: self._choice_text(command, prefix)
            for command, prefix in zip(job.commands, job.prefixes, strict=True)
            for index in range(command.n)
        }

    def _choice_text(self, command: GenerateCommand, prefix: Prefix | None) -> ChoiceText:
        request = self.job.request
        include_stop = bool(request.include_stop_str_in_output)
        skip_special = request.skip_special_tokens is not False
        return ChoiceText(
            Detokenizer(self.codec, command.prompt_ids, skip_special_tokens=skip_special),
            StopScanner(request.stops, include=include_stop),
            TextRules(
                stop_token_ids=request.stop_token_ids or [],
                include_stop=include_stop,
                min_tokens=request.min_tokens or 0,
                log_probs=request.num_top_log_probs is not None,
                origins=request.options.metrics == "detailed",
            ),
            prefix,
        )

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Raises ApiError when the request fails; close it to give the rows back."""
        job = self.job
        events = self._pool.generate(job.commands, model=job.served_model, arrived=job.arrived)
        async with contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, StepEvent):
                    delta = self._on_step(event)
                    if delta is not None:
                        yield delta
                elif isinstance(event, FinishedEvent):
                    self.report.stats.append(event.stats)
                else:
                    raise api_error(event)

    def _on_step(self, event: StepEvent) -> Delta | None:
        text = self._texts[event.choice]
        if text.finished:
            return None
        if event.token_ids:
            self.report.note_tokens(time.monotonic())
        delta = text.push(event)
        if delta.finish_reason is not None and self.job.request.stops:
            self._pool.finish(event.id, event.choice, delta.num_tokens)
        return delta

    def ranked(self) -> list[int]:
        """The choices of the response: of each prompt's candidates the `n` likeliest, best first."""
        kept: list[int] = []
        for command in self.job.commands:
            candidates = range(command.choice_offset, command.choice_offset + command.n)
            num_choices = self.job.request.num_choices
            if command.n > num_choices:
                best = sorted(candidates, key=lambda index: -self._texts[index].log_prob_mean)
                kept += best[:num_choices]
            else:
                kept += candidates
        return kept

    def usage_so_far(self) -> dict[str, int]:
        return usage(self.report.prompt_tokens, sum(text.num_tokens for text in self._texts.values()))

    def body(self, kind: str, choices: Sequence[Any]) -> dict[str, Any]:
        """What the response and every chunk have in common."""
        return {
            "id": self.job.id,
            "object": kind,
            "created": self._created,
            "model": self.job.request.model,
            "choices": choices,
            "system_fingerprint": self._fingerprint + ("" if self._pool.draft_enabled else TARGET_ONLY),
        }


def api_error(event: FailedEvent) -> ApiError:
    if event.code in OVERLOAD_MESSAGES:
        return OverloadedError(event.code)
    if event.code == "invalid_value":
        return InvalidRequestError(
            "The request cannot be decoded: check 'prompt' and 'max_tokens'.", code=event.code
        )
    return ServerError(event.code)
