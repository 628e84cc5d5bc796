"""The official client: every route, whole and streamed, every kind of error as its own exception."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from openai.types import CompletionUsage, Model

from tests.contract.conftest import KEY
from tests.contract.typed import parse
from tests.e2e.conftest import RunningServer
from tests.server.conftest import Serve, Served
from tests.server.fakes import ScriptedEngine, until

pytestmark = pytest.mark.slow

ASKED: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 0, "seed": 3}
MESSAGES: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def counts(usage: CompletionUsage | None) -> tuple[int, int, int]:
    """All but the details: what was found in a cache depends on what came before."""
    assert usage is not None
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def test_models(client: openai.OpenAI) -> None:
    page = client.models.list()
    target, draft = page
    assert target.id == "tiny"
    assert draft.id.endswith("tiny-draft")
    for model in page:
        assert client.models.retrieve(model.id) == model
        parse(Model, model.model_dump())
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("nope")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt="Hello", logprobs=2, n=2, **ASKED)
    assert whole.object == "text_completion"
    assert whole.id.startswith("cmpl-")
    assert whole._request_id
    assert abs(whole.created - time.time()) < 600
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.usage.completion_tokens_details is None
    stream = client.completions.create(
        prompt="Hello", n=2, logprobs=2, stream=True, stream_options={"include_usage": True}, **ASKED
    )
    text = ["", ""]
    for chunk in stream:
        assert (chunk.id.startswith("cmpl-"), chunk.object) == (True, "text_completion")
        for choice in chunk.choices:
            text[choice.index] += choice.text
    assert text == [choice.text for choice in whole.choices]
    assert counts(chunk.usage) == counts(whole.usage)
    assert chunk.system_fingerprint == whole.system_fingerprint


def test_what_only_this_server_says(client: openai.OpenAI) -> None:
    """Own fields go through `extra_body` and come back as attributes."""
    whole: Any = client.completions.create(
        prompt="Hello", extra_body={"speculative": {"method": "mtad", "beam_width": 2}}, **ASKED
    )
    assert whole.metrics["speculative"]["method"] == "mtad"
    assert whole.metrics["speculative"]["beam_width"] == 2
    assert whole.metrics["energy"] is None or whole.metrics["energy"]["joules"] > 0


def test_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **ASKED)
    choice = whole.choices[0]
    assert (whole.object, choice.message.role) == ("chat.completion", "assistant")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert whole.usage is not None
    assert len(choice.logprobs.content) == whole.usage.completion_tokens
    assert whole.usage.prompt_tokens == len("user: Hello\nassistant:") + 1
    stream = client.chat.completions.create(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **ASKED
    )
    chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == choice.message.content
    assert counts(chunks[-1].usage) == counts(whole.usage)


def test_raw_responses_have_the_id(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(
        prompt="x", extra_headers={"x-request-id": "mine-1"}, **ASKED
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.parse()._request_id == "mine-1"


async def test_asynchronous(server: RunningServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        whole, stream = await asyncio.gather(
            client.completions.create(prompt="Hello", **ASKED),
            client.completions.create(prompt="Hello", stream=True, **ASKED),
        )
        text = "".join([choice.text async for chunk in stream for choice in chunk.choices])
    assert text == whole.choices[0].text


@pytest.mark.parametrize(
    ("fields", "kind", "code", "param"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found", "model"),
        ({"n": 0}, openai.BadRequestError, "integer_below_min_value", "n"),
        ({"temperature": 3}, openai.BadRequestError, "decimal_above_max_value", "temperature"),
        ({"prompt": []}, openai.BadRequestError, "empty_array", "prompt"),
        ({"suffix": "x"}, openai.BadRequestError, "unsupported_parameter", "suffix"),
        ({"extra_body": {"foo": 1}}, openai.BadRequestError, "unknown_parameter", "foo"),
        ({"max_tokens": 10_000}, openai.BadRequestError, "context_length_exceeded", "max_tokens"),
        (
            {"extra_headers": {"content-type": "text/plain"}},
            openai.APIStatusError,
            "unsupported_media_type",
            None,
        ),
        ({"user": "x" * 2**20}, openai.APIStatusError, "content_too_large", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(
    client: openai.OpenAI, fields: Any, kind: type[openai.APIStatusError], code: str, param: str, stream: bool
) -> None:
    with pytest.raises(kind) as error:
        client.completions.create(**({"prompt": "x", "stream": stream} | ASKED | fields))
    check(error.value, code, param)


def check(error: openai.APIStatusError, code: str | None, param: str | None) -> None:
    assert (error.code, error.param) == (code, param)
    assert error.request_id
    assert error.type in ("invalid_request_error", "rate_limit_error", "overloaded_error", "server_error")
    assert isinstance(error.body, dict)
    assert set(error.body) == {"message", "type", "param", "code"}


def test_keys(guarded: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as error:
            client.completions.create(prompt="x", **ASKED)
        check(error.value, "invalid_api_key", None)
        assert client.with_options(api_key=KEY).completions.create(prompt="x", **ASKED).choices


@asynccontextmanager
async def asking(served: Served, **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"http://127.0.0.1:{served.port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", **{"max_retries": 0, **options}) as client:
        yield client


async def test_rate_limit(serve_port: Serve) -> None:
    async with serve_port(requests_per_minute=1) as served, asking(served) as client:
        await client.completions.create(prompt="x", model="tiny")
        with pytest.raises(openai.RateLimitError) as error:
            await client.completions.create(prompt="x", model="tiny")
    check(error.value, "rate_limit_exceeded", None)
    assert int(error.value.response.headers["retry-after"]) >= 1


async def test_overload_and_failure(serve_port: Serve) -> None:
    """503 and 500 are the client's InternalServerError, which it retries by itself."""
    engine = ScriptedEngine()
    async with serve_port(engine, max_num_seqs=1, max_num_queued_reqs=0) as served, asking(served) as client:
        engine.gate.clear()
        running = asyncio.ensure_future(client.completions.create(prompt="x", model="tiny"))
        await until(lambda: len(engine.added) == 1)
        with pytest.raises(openai.InternalServerError) as error:
            await client.completions.create(prompt="x", model="tiny")
        check(error.value, "queue_full", None)
        assert error.value.status_code == 503
        engine.gate.set()
        assert (await running).choices
        engine.failures.append(RuntimeError("broken"))
        with pytest.raises(openai.InternalServerError) as error:
            await client.completions.create(prompt="x", model="tiny")
        check(error.value, "worker_failed", None)
        engine.failures.append(RuntimeError("broken"))
        retrying = client.with_options(max_retries=2)
        assert (await retrying.completions.create(prompt="x", model="tiny")).choices


async def test_failure_in_a_stream(serve_port: Serve) -> None:
    engine = ScriptedEngine(tokens_per_step=1, hold_after=1)
    async with serve_port(engine) as served, asking(served) as client:
        stream = await client.completions.create(prompt="x", model="tiny", stream=True)
        assert (await anext(stream)).choices[0].text
        engine.failures.append(RuntimeError("broken"))
        engine.gate.set()
        with pytest.raises(openai.APIError) as error:
            await anext(stream)
    assert error.value.code == "worker_failed"
    assert error.value.type == "server_error"
