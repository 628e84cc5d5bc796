"""What is refused before a request is looked at: media type, encoding, size, time, a full queue."""

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import Request

from server.errors import InvalidRequestError
from server.pool import WorkerPool

MAX_BODY_BYTES = 1024 * 1024
BODY_SECONDS = 30.0
MAX_HEADERS = 100
HEADER_BYTES_LIMIT = 64 * 1024
CLOSE = {"connection": "close"}


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
    if declared is not None and declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise too_large()


async def request_slot(request: Request) -> AsyncIterator[None]:
    """Held until the response is sent; 503 when there is none."""
    pool: WorkerPool = request.app.state.pool
    with pool.slot():
        yield


async def read_body(request: Request) -> bytes:
    """The body, counted as it arrives: 413 beyond `MAX_BODY_BYTES`, 408 after `BODY_SECONDS`."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise too_large()
    except TimeoutError:
        message = f"The body did not arrive within {BODY_SECONDS:.0f} s: send it faster."
        raise InvalidRequestError(message, code="request_timeout", status=408, headers=CLOSE) from None
    return bytes(body)


def too_large() -> InvalidRequestError:
    message = f"The body must have at most {MAX_BODY_BYTES} bytes: send less at once."
    return InvalidRequestError(message, code="content_too_large", status=413, headers=CLOSE)
