"""Keys: who is let in, that nothing is read before, and which routes are open."""

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import pytest

from tests.server.conftest import Serve, Served
from tests.server.test_bad_input import check_error

KEYS = ["first-key", "zweiter-schlüssel"]
OPEN = {"/health", "/ready", "/metrics", "/"}


@pytest.fixture
async def locked(serve: Serve) -> AsyncIterator[Served]:
    async with serve(api_key=KEYS) as served:
        yield served


def routes_of(routes: Iterable[Any]) -> Iterator[tuple[str, set[str]]]:
    """Path and methods of every route, those of included routers too."""
    for route in routes:
        if hasattr(route, "original_router"):
            yield from routes_of(route.original_router.routes)
        else:
            yield route.path, route.methods


def bearer(key: str | bytes, scheme: bytes = b"Bearer") -> dict[bytes, bytes]:
    return {b"authorization": scheme + b" " + (key.encode() if isinstance(key, str) else key)}


@pytest.mark.parametrize("headers", [bearer(KEYS[0]), bearer(KEYS[1]), bearer(KEYS[0], b"bearer")])
async def test_a_key_lets_in(locked: Served, headers: Any) -> None:
    response = await locked.client.post("/v1/completions", json={"model": "tiny"}, headers=headers)
    assert response.status_code == 200


async def test_no_key(locked: Served) -> None:
    response = await locked.complete()
    message = check_error(response, 401, None, None)
    assert message.startswith("You didn't provide an API key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert locked.engine.added == []


@pytest.mark.parametrize(
    "headers",
    [
        bearer("wrong"),
        bearer(""),
        bearer(KEYS[0][:-1]),
        bearer(KEYS[0] + "x"),
        bearer("\u0660ключ"),
        bearer(b"\xff\xfe"),
        bearer("k" * 60_000),
        bearer(KEYS[0], b"Basic"),
        bearer("", b""),
        {b"authorization": KEYS[0].encode()},
    ],
)
async def test_wrong_keys(locked: Served, headers: Any) -> None:
    response = await locked.client.post("/v1/completions", json={"model": "tiny"}, headers=headers)
    check_error(response, 401, "invalid_api_key", None)
    assert response.headers["www-authenticate"] == "Bearer"


async def test_a_body_is_not_read(locked: Served) -> None:
    async def body() -> Any:
        raise AssertionError("the body was read")
        yield b""

    headers = {"authorization": "Bearer wrong", "content-length": str(100_000_000)}
    response = await locked.client.post("/v1/completions", content=body(), headers=headers)
    check_error(response, 401, "invalid_api_key", None)
    assert response.headers["connection"] == "close"


async def test_every_route_but_the_open_ones_needs_a_key(locked: Served) -> None:
    routes = dict(routes_of(locked.app.routes))
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/models", *OPEN} <= set(routes)
    assert {"/docs", "/openapi.json"} <= set(routes)
    routes |= {"/nope": {"GET"}, "/health/": {"GET"}, "/health/../v1/models": {"GET"}}
    for path, methods in routes.items():
        address = path.replace("{name}", "page.js")
        is_open = path in OPEN or path.startswith("/playground/")
        for method in {*methods, "DELETE", "TRACE"}:
            response = await locked.client.request(method, address)
            assert (response.status_code != 401) == is_open, (method, address)
    check_error(await locked.client.get("/nope", headers=bearer(KEYS[0])), 404, None, None)


async def test_keys_share_no_cache(locked: Served) -> None:
    """Nor does a key's salt hold the key."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    for key in (*KEYS, KEYS[0]):
        response = await locked.client.post("/v1/completions", json=body, headers=bearer(key))
        assert response.status_code == 200
    salts = [sequence.cache_salt for sequence in locked.engine.added]
    assert salts[0] == salts[2] != salts[1] != ""
    assert not any(key in salt for key in KEYS for salt in salts)


async def test_without_keys_everything_is_open(served: Served) -> None:
    assert (await served.client.get("/v1/models")).status_code == 200
    await served.complete()
    assert served.engine.added[0].cache_salt == ""


async def test_keys_are_in_no_log(locked: Served, logs: Any) -> None:
    await locked.client.get("/v1/models", headers=bearer(KEYS[0]))
    await locked.client.get("/v1/models", headers=bearer("wrong-key"))
    assert "-key" not in logs.getvalue()


async def test_pages_of_allowed_origins_may_ask(serve: Serve) -> None:
    async with serve(api_key=KEYS, allowed_origins=["https://a.example"]) as served:
        asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
        asked["access-control-request-headers"] = "authorization"
        preflight = await served.client.options("/v1/completions", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        refused = await served.client.get("/v1/models", headers={"origin": "https://a.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        other = await served.client.get("/v1/models", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
