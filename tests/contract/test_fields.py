"""Each accepted field with each method, at its default and at one other value, all in one batch."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.contract.fields import CHAT as CHAT_FIELDS
from tests.contract.fields import COMPLETION, MAX_TOKENS, METHODS, PROMPT, SAMPLING, SPECULATIVE, Field
from tests.contract.typed import CHAT, COMPLETIONS, WHOLE, events, parse, parse_chunk
from tests.e2e.conftest import RunningServer

pytestmark = pytest.mark.slow

STARTS: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": "tiny", "prompt": PROMPT, "max_tokens": MAX_TOKENS, "seed": 7},
    CHAT: {
        "model": "tiny",
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": MAX_TOKENS,
        "seed": 7,
    },
}
FIELDS = {COMPLETIONS: [*SAMPLING, *COMPLETION], CHAT: [*SAMPLING, *CHAT_FIELDS]}
AT_ONCE = 16


class Asker:
    """One route and one method of the shared server."""

    def __init__(self, client: httpx.AsyncClient, route: str, method: str) -> None:
        self._client = client
        self._route = route
        self._start = STARTS[route] | {"speculative": {"method": method}}
        self._gate = asyncio.Semaphore(AT_ONCE)

    async def ask(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The answer, read by the client's types; `speculative` keys join the method."""
        body = self._start | fields
        body["speculative"] = self._start["speculative"] | fields.get("speculative", {})
        async with self._gate:
            response = await self._client.post(self._route, json=body)
        assert response.status_code == 200, (fields, response.text)
        answer: dict[str, Any] = response.json()
        parse(WHOLE[self._route], answer)
        assert answer["metrics"]["speculative"]["method"] == body["speculative"]["method"]
        return answer

    async def stream(self, fields: dict[str, Any]) -> list[dict[str, Any]]:
        async with self._gate:
            response = await self._client.post(self._route, json=self._start | {"stream": True} | fields)
        assert response.status_code == 200, (fields, response.text)
        chunks = list(events(response))
        for chunk in chunks:
            parse_chunk(self._route, chunk)
        return chunks

    async def check(self, field: Field, *, inside: bool = False) -> str | None:
        """Both cells of a field; says what is wrong."""

        def given(value: Any) -> dict[str, Any]:
            own = {field.name: value}
            return field.needs | ({"speculative": own} if inside else own)

        absent, default, other = await asyncio.gather(
            self.ask(field.needs if field.name != "prompt" else {"prompt": None}),
            self.ask(given(field.default)),
            self.ask(given(field.other)),
        )
        named = f"{field.name}={field.other!r} after {field.default!r}"
        if field.name != "seed" and default["choices"] != absent["choices"]:
            return f"{named}: the default is not what omitting it gives"
        if not field.effect(other, absent):
            return f"{named}: no effect in {other} after {absent}"
        return None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
async def test_fields(server: RunningServer, route: str, method: str) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        asker = Asker(client, route, method)
        found = await asyncio.gather(
            *(asker.check(field) for field in FIELDS[route]),
            *(asker.check(field, inside=True) for field in SPECULATIVE),
        )
    assert [wrong for wrong in found if wrong is not None] == []


def text_of(chunks: list[dict[str, Any]]) -> str:
    parts = [choice.get("delta", choice) for chunk in chunks for choice in chunk["choices"]]
    return "".join(part.get("text") or part.get("content") or "" for part in parts)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
async def test_streams(server: RunningServer, route: str, method: str) -> None:
    """`stream` and its options: what they add, and that the text is that of the whole answer."""
    options = ({}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True})
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        asker = Asker(client, route, method)
        whole, plain, *streams = await asyncio.gather(
            asker.ask({"stream": False}),
            asker.stream({}),
            *(asker.stream({"stream_options": each | {"include_obfuscation": True}}) for each in options),
        )
    choice = whole["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    for chunks in (plain, *streams):
        assert text_of(chunks) == text
        assert [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]] == [
            choice["finish_reason"]
        ]
    assert not any("usage" in chunk for chunk in (*plain, *streams[0]))
    for chunks in streams[1:]:
        end = chunks[-1]
        assert (end["choices"], end["usage"]["total_tokens"]) == ([], whole["usage"]["total_tokens"])
        assert 0 <= end["usage"]["prompt_tokens_details"]["cached_tokens"] < end["usage"]["prompt_tokens"]
        assert chunks[-1]["metrics"]["speculative"] == whole["metrics"]["speculative"]
    assert all(chunk["usage"] is None for chunk in streams[1][:-1])
    counts = [chunk["usage"]["completion_tokens"] for chunk in streams[2]]
    assert counts == sorted(counts)
    assert counts[-1] == whole["usage"]["completion_tokens"]


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
async def test_models_and_switches(server: RunningServer, route: str) -> None:
    """`model` and `speculative: false`: the draft answers alone, the target plainly."""
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        _, draft = (model["id"] for model in (await client.get("/v1/models")).json()["data"])
        start = {name: value for name, value in STARTS[route].items() if name != "model"}
        for fields, method in (
            ({"model": "tiny"}, "mmtad"),
            ({"model": "tiny", "speculative": False}, "target"),
            ({"model": draft}, "draft"),
            ({"model": draft, "speculative": {"method": "draft"}}, "draft"),
        ):
            body = (await client.post(route, json=start | fields)).json()
            parse(WHOLE[route], body)
            assert (body["model"], body["metrics"]["speculative"]["method"]) == (fields["model"], method)
