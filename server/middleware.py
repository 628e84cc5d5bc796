"""Around every request: its id, its count, and an answer whatever happens."""

import re
import secrets

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, InvalidRequestError, ServerError, error_response
from server.limits import CLOSE, HEADER_BYTES_LIMIT, MAX_HEADERS
from server.metrics import Metrics

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

PROBES = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds

log = structlog.get_logger("server.http")


class RequestMiddleware:
    """Sets `x-request-id` on every response and answers 500 to what nobody else caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        answer = _Answer(send, request_id)
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._serve(scope, receive, answer, headers)
            except Exception:
                log.exception("request_failed")
                if answer.status is None:
                    await error_response(ServerError(), request_id)(scope, receive, answer)
            self._account(scope, answer.status or 499)

    def _account(self, scope: Scope, status: int) -> None:
        """By route template, never by path: a scanner's paths are no labels and no log fields."""
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.http_requests.labels(route, str(status)).inc()
        if route not in PROBES:
            log.info("request", method=scope["method"], route=route, status=status)

    async def _serve(self, scope: Scope, receive: Receive, answer: "_Answer", headers: Headers) -> None:
        refusal = _refusal(headers)
        if refusal is None:
            await self._app(scope, receive, answer)
        else:
            await error_response(refusal)(scope, receive, answer)


class _Answer:
    """The `send` of one request: adds the id's header, remembers the status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self._request_id
        await self._send(message)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def _refusal(headers: Headers) -> ApiError | None:
    """Headers over which a proxy and this server could disagree, and too many of them."""
    if len(headers) > MAX_HEADERS:
        message = f"At most {MAX_HEADERS} headers are taken: send fewer."
        return InvalidRequestError(message, code=None, status=431, headers=CLOSE)
    # h11 bounds only what arrives in pieces.
    if sum(len(name) + len(value) for name, value in headers.raw) > HEADER_BYTES_LIMIT:
        message = f"The headers must have at most {HEADER_BYTES_LIMIT} bytes: send less."
        return InvalidRequestError(message, code=None, status=431, headers=CLOSE)
    if "content-length" in headers and "transfer-encoding" in headers:
        message = "Content-Length and Transfer-Encoding exclude each other: send one of them."
        return InvalidRequestError(message, code=None, headers=CLOSE)
    return None
