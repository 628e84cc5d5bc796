"""How often one key may ask, or one address where no key is asked for."""

import math
import time

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from starlette.types import ASGIApp, Receive, Scope, Send

from server.auth import is_open
from server.errors import RateLimitError, error_response


class RateLimitMiddleware:
    """Answers 429 beyond `per_minute` requests of one key or address, before the body is read."""

    def __init__(self, app: ASGIApp, per_minute: int) -> None:
        self._app = app
        self._per_minute = RateLimitItemPerMinute(per_minute)
        # Its memory per client is two counters, which end with their minutes.
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limited = scope["type"] == "http" and not is_open(scope)
        client = _client(scope) if limited else ""
        if not limited or await self._limiter.hit(self._per_minute, client):
            await self._app(scope, receive, send)
            return
        stats = await self._limiter.get_window_stats(self._per_minute, client)
        pause = max(1, math.ceil(stats.reset_time - time.time()))
        request_id = scope.get("state", {}).get("request_id")
        refusal = RateLimitError(self._per_minute.amount, pause)
        await error_response(refusal, request_id)(scope, receive, send)


def _client(scope: Scope) -> str:
    digest: str | None = scope.get("state", {}).get("key_digest")
    if digest is not None:
        return digest
    return scope["client"][0] if scope.get("client") else "unknown"
