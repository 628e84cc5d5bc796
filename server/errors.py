"""Errors that a client is told, in OpenAI's shape: `{"error": {message, type, param, code}}`.

    ApiError                      status   type
      InvalidRequestError         400      invalid_request_error, also 401, 404, 405, 408, 413, 415, 431
      RateLimitError              429      rate_limit_error, with Retry-After
      OverloadedError             503      overloaded_error, with Retry-After
      ServerError                 500      server_error

A message names the field and the cure and never echoes the input; that of a 5xx is a constant plus
the request's id, details are in the log only.
"""

from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

RETRY_AFTER_SECONDS = 1

OVERLOAD_MESSAGES = {
    "queue_full": "The server's queue is full. Retry after a moment, or ask for fewer choices or tokens.",
    "model_loading": "The models are still loading. Retry once /ready answers 200.",
    "draining": "The server is shutting down. Send the request to another replica.",
    "out_of_memory": "The device has no memory left for this request. Retry later, or ask for less at once.",
    "no_worker": "No worker is ready to decode. Retry after a moment.",
}

HTTP_MESSAGES = {
    404: "There is no such path. GET /openapi.json lists the routes.",
    405: "This path does not take that method; the Allow header names those it takes.",
}


class ApiError(Exception):
    """One answer to the client; `param` is the dotted path of the field at fault."""

    status = 500
    type = "server_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None,
        param: str | None = None,
        status: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.status = status if status is not None else type(self).status
        self.headers = headers or {}

    @property
    def reason(self) -> str:
        """The label of this error in metrics and logs, out of a closed set."""
        return self.code or f"http_{self.status}"

    @property
    def is_refusal(self) -> bool:
        """Whether the request was turned away, and did not fail while it was served."""
        return self.type != ServerError.type

    def body(self, request_id: str | None = None) -> dict[str, Any]:
        message = self.message
        if self.status >= 500 and request_id is not None:
            message = f"{message} Request id: {request_id}."
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequestError(ApiError):
    status = 400
    type = "invalid_request_error"


class RateLimitError(ApiError):
    """More requests per minute than one key, or one address, may send."""

    status = 429
    type = "rate_limit_error"

    def __init__(self, per_minute: int, retry_after_seconds: int) -> None:
        message = f"At most {per_minute} requests per minute are taken from you: retry after the pause."
        headers = {"retry-after": str(retry_after_seconds)}
        super().__init__(message, code="rate_limit_exceeded", headers=headers)


class OverloadedError(ApiError):
    """The server cannot take the request now; `code` is one of `OVERLOAD_MESSAGES`."""

    status = 503
    type = "overloaded_error"

    def __init__(self, code: str) -> None:
        headers = {"retry-after": str(RETRY_AFTER_SECONDS)}
        super().__init__(OVERLOAD_MESSAGES[code], code=code, headers=headers)


class ServerError(ApiError):
    def __init__(self, code: str | None = None) -> None:
        super().__init__("The server could not complete the request.", code=code)


class ClientGoneError(Exception):
    """The client left: nobody is to be answered."""


class ErrorResponse(Response):
    """An error as it is sent; the request's state keeps it for the log and the metrics."""

    def __init__(self, error: ApiError, request_id: str | None) -> None:
        super().__init__(
            msgspec.json.encode(error.body(request_id)),
            status_code=error.status,
            headers=error.headers,
            media_type="application/json",
        )
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        note_error(scope, self._error)
        await super().__call__(scope, receive, send)


def note_error(scope: Scope, error: ApiError) -> None:
    """Remember what the client is told, in an answer of its own or inside a stream."""
    scope.setdefault("state", {})["error"] = error


def error_response(error: ApiError, request_id: str | None = None) -> Response:
    return ErrorResponse(error, request_id)


def request_id_of(request: Request) -> str | None:
    return getattr(request.state, "request_id", None)


async def handle_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error, request_id_of(request))


async def handle_http_exception(request: Request, error: Exception) -> Response:
    """The router's own 404 and 405, with their `Allow` header."""
    assert isinstance(error, HTTPException)
    message = HTTP_MESSAGES.get(error.status_code, "The request could not be served.")
    answer = InvalidRequestError(
        message, code=None, status=error.status_code, headers=dict(error.headers or {})
    )
    return error_response(answer, request_id_of(request))


async def handle_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)
