"""What is refused before a request is looked at: media type, encoding, size, time, a full queue."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.requests import Request

from server.errors import InvalidRequestError
from server.pool import WorkerPool

CLOSE = {"connection": "close"}


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What one connection may cost; times in seconds."""

    num_headers: int = 100
    header_bytes: int = 64 * 1024
    header_seconds: float = 15.0
    body_bytes: int = 1024 * 1024
    body_seconds: float = 30.0
    reader_seconds: float = 30.0  # without taking anything of an answer that is ready


async def check_media_type(request: Request) -> None:
    """415 for everything but uncompressed JSON: a compressed body may inflate without bound."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if media_type != "application/json":
        raise _unsupported("The Content-Type must be application/json.")
    if encoding not in ("", "identity"):
        raise _unsupported("The body must not be compressed: remove Content-Encoding.")


def _unsupported(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, code="unsupported_media_type", status=415, headers=CLOSE)


async def check_declared_length(request: Request) -> None:
    declared = request.headers.get("content-length")
    limits: HttpLimits = request.app.state.limits
    if declared is not None and declared.isdigit() and int(declared) > limits.body_bytes:
        raise too_large(limits)


async def request_slot(request: Request) -> AsyncIterator[None]:
    """Held until the response is sent; 503 when there is none."""
    pool: WorkerPool = request.app.state.pool
    with pool.slot():
        yield


async def read_body(request: Request) -> bytes:
    """The body, counted as it arrives: 413 when it is too large, 408 when it takes too long."""
    limits: HttpLimits = request.app.state.limits
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise too_large(limits)
    except TimeoutError:
        message = f"The body did not arrive within {limits.body_seconds:g} s: send it faster."
        raise InvalidRequestError(message, code="request_timeout", status=408, headers=CLOSE) from None
    return bytes(body)


def too_large(limits: HttpLimits) -> InvalidRequestError:
    message = f"The body must have at most {limits.body_bytes} bytes: send less at once."
    return InvalidRequestError(message, code="content_too_large", status=413, headers=CLOSE)


def headers_too_large(limits: HttpLimits) -> InvalidRequestError:
    message = f"The headers must have at most {limits.header_bytes} bytes: send less."
    return InvalidRequestError(message, code=None, status=431, headers=CLOSE)
