"""What is kept of every request at its end: its counts, and one line of the log.

The line never holds a prompt or a key: of a key it has the beginning of its digest, of `user` a hash.
"""

from typing import Any, Protocol

import structlog
from starlette.types import Scope

from server.errors import ApiError
from server.metrics import Metrics

PROBES = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds
HTTP_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
KEY_CHARACTERS = 8
OTHER = "other"

log = structlog.get_logger("server.http")


class HasLogFields(Protocol):
    """What a generation leaves in the request's state, as `report`."""

    def log_fields(self) -> dict[str, Any]:
        """What the request's line says of it."""


class RequestLog:
    """Counts and writes; by route template, never by path: a scanner's paths are no labels, no fields."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def record(self, scope: Scope, status: int, seconds: float) -> None:
        """One request ended, `seconds` after its headers were there."""
        state = scope["state"]
        route = getattr(scope.get("route"), "path", OTHER)
        error: ApiError | None = state.get("error")
        self._metrics.http_requests.labels(route, str(status)).inc()
        if route in PROBES:
            return
        if error is not None and error.is_refusal and error.status == status:
            self._metrics.rejected.labels(error.reason).inc()
        report: HasLogFields | None = state.get("report")
        fields = {} if report is None else report.log_fields()
        if error is not None:
            fields["error"] = error.reason
        if "key_digest" in state:
            fields["key"] = state["key_digest"][:KEY_CHARACTERS]
        http_method = scope["method"] if scope["method"] in HTTP_METHODS else OTHER
        duration = round(1000 * seconds, 3)
        log.info(
            "request", http_method=http_method, route=route, status=status, duration_ms=duration, **fields
        )

    def record_unread(self, error: ApiError, request_id: str) -> None:
        """A connection was refused before its bytes were a request."""
        self._metrics.http_requests.labels(OTHER, str(error.status)).inc()
        self._metrics.rejected.labels(error.reason).inc()
        log.info("request", request_id=request_id, route=OTHER, status=error.status, error=error.reason)
