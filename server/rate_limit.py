"""How often one key may ask, or one address where no key is asked for."""

import math

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from starlette.types import ASGIApp, Receive, Scope, Send

from server.auth import is_open
from server.errors import RateLimitError, error_response

ROUNDING = 1e-3  # seconds, more than what floating-point clocks lose


class RateLimitMiddleware:
    """Answers 429 beyond `per_minute` requests of one key or address, before the body is read."""

    def __init__(self, app: ASGIApp, per_minute: int) -> None:
        self._app = app
        self._per_minute = RateLimitItemPerMinute(per_minute)
        # Its memory per client is two counters, which end with their minutes.
        self._storage = MemoryStorage()
        self._limiter = SlidingWindowCounterRateLimiter(self._storage)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limited = scope["type"] == "http" and not is_open(scope)
        client = _client(scope) if limited else ""
        if not limited or await self._limiter.hit(self._per_minute, client):
            await self._app(scope, receive, send)
            return
        refusal = RateLimitError(self._per_minute.amount, await self._pause(client))
        request_id = scope.get("state", {}).get("request_id")
        await error_response(refusal, request_id)(scope, receive, send)

    async def _pause(self, client: str) -> int:
        """Whole seconds until one more request is taken; the limiter's own figure may be too early.

        The last minute's requests count less and less while this minute passes.
        """
        key, minute = self._per_minute.key_for(client), self._per_minute.get_expiry()
        last, last_left, this, this_left = await self._storage.get_sliding_window(key, minute)
        room = self._per_minute.amount - this
        seconds = last_left - room * minute / last if room > 0 and last else this_left - minute
        return math.floor(seconds + ROUNDING) + 1


def _client(scope: Scope) -> str:
    digest: str | None = scope.get("state", {}).get("key_digest")
    if digest is not None:
        return digest
    return scope["client"][0] if scope.get("client") else "unknown"
