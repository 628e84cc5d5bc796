"""Who may ask: every path but the probes and the static page needs a key, before its body is read."""

from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import InvalidRequestError, error_response
from server.keys import known_digest

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/metrics"})
OPEN_FOLDER = "/playground/"  # what the page is made of
HEADERS = {"www-authenticate": "Bearer", "connection": "close"}


class KeyMiddleware:
    """Answers 401 to requests without one of the keys whose `digests` it holds."""

    def __init__(self, app: ASGIApp, digests: Sequence[bytes]) -> None:
        self._app = app
        self._digests = digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None if scope["type"] != "http" or is_open(scope) else self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
            return
        request_id = scope.get("state", {}).get("request_id")
        await error_response(refusal, request_id)(scope, receive, send)

    def _refusal(self, scope: Scope) -> InvalidRequestError | None:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), None)
        if given is None:
            message = "You didn't provide an API key: send the header Authorization: Bearer YOUR_KEY."
            return InvalidRequestError(message, code=None, status=401, headers=HEADERS)
        scheme, _, key = given.partition(b" ")
        digest = known_digest(key.strip(), self._digests)
        if digest is not None and scheme.lower() == b"bearer":
            scope.setdefault("state", {})["key_digest"] = digest.hex()
            return None
        message = "Incorrect API key provided: send Authorization: Bearer and a key of this server."
        return InvalidRequestError(message, code="invalid_api_key", status=401, headers=HEADERS)


def is_open(scope: Scope) -> bool:
    """Whether a path is for everybody: it needs no key and is not counted against a rate."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)
