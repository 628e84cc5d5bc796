"""Around every request: its id, its account, and an answer whatever happens."""

import re
import secrets
import time

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, InvalidRequestError, ServerError, error_response
from server.limits import CLOSE, HttpLimits, headers_too_large
from server.request_log import RequestLog

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
CLIENT_LEFT = 499

log = structlog.get_logger("server.http")


class RequestMiddleware:
    """Sets `x-request-id` on every response and answers 500 to what nobody else caught."""

    def __init__(self, app: ASGIApp, request_log: RequestLog, limits: HttpLimits) -> None:
        self._app = app
        self._log = request_log
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        body = _Body(receive, headers)
        answer = _Answer(send, request_id, body)
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._serve(scope, body, answer, headers)
            except Exception:
                log.exception("request_failed")
                if answer.status is None:
                    await error_response(ServerError(), request_id)(scope, body, answer)
            self._log.record(scope, answer.status or CLIENT_LEFT, time.monotonic() - started)

    async def _serve(self, scope: Scope, receive: Receive, answer: "_Answer", headers: Headers) -> None:
        refusal = _refusal(headers, self._limits)
        if refusal is None:
            await self._app(scope, receive, answer)
        else:
            await error_response(refusal)(scope, receive, answer)


class _Body:
    """The `receive` of one request: knows whether some of its body is still to come."""

    def __init__(self, receive: Receive, headers: Headers) -> None:
        self._receive = receive
        self.unread = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"

    async def __call__(self) -> Message:
        message = await self._receive()
        self.unread = self.unread and message.get("more_body", False)
        return message


class _Answer:
    """The `send` of one request: adds the id's header, remembers the status.

    After an answer that did not wait for the body the connection ends: nothing bounds how long what
    is left of the body would take.
    """

    def __init__(self, send: Send, request_id: str, body: _Body) -> None:
        self._send = send
        self._request_id = request_id
        self._body = body
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._request_id
            if self._body.unread:
                headers["connection"] = "close"
        await self._send(message)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def _refusal(headers: Headers, limits: HttpLimits) -> ApiError | None:
    """Headers over which a proxy and this server could disagree, and too many of them."""
    if len(headers) > limits.num_headers:
        message = f"At most {limits.num_headers} headers are taken: send fewer."
        return InvalidRequestError(message, code=None, status=431, headers=CLOSE)
    # h11 bounds only what arrives in pieces.
    if sum(len(name) + len(value) for name, value in headers.raw) > limits.header_bytes:
        return headers_too_large(limits)
    if "content-length" in headers and "transfer-encoding" in headers:
        message = "Content-Length and Transfer-Encoding exclude each other: send one of them."
        return InvalidRequestError(message, code=None, headers=CLOSE)
    return None
