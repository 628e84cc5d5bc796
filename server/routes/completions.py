"""`POST /v1/completions`."""

import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.generation import Generation
from server.limits import read_body
from server.routes.common import GATES, admission_of, body_of
from server.schemas import CompletionRequest
from server.shapes import CompletionShape
from server.streaming import respond
from server.validation import parse_completion

router = APIRouter(tags=["completions"])


@router.post(
    "/v1/completions",
    dependencies=GATES,
    openapi_extra=body_of(CompletionRequest),
    response_class=Response,
)
async def create_completion(request: Request) -> Response:
    """Complete one or more prompts, as JSON or, with `stream`, as server-sent events."""
    arrived = time.monotonic()
    parsed = parse_completion(await read_body(request))
    job = await admission_of(request).admit(parsed, arrived=arrived)
    state = request.app.state
    return await respond(request, Generation(state.pool, job, state.fingerprint, CompletionShape()))
