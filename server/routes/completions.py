"""`POST /v1/completions`."""

import time

import msgspec
from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from server.admission import Admission
from server.limits import check_declared_length, check_media_type, read_body, request_slot
from server.pool import WorkerPool
from server.streaming import EventStreamResponse, Generation, collect_while_connected
from server.validation import parse_completion

router = APIRouter(tags=["completions"])

BODY = {"application/json": {"schema": {"$ref": "#/components/schemas/CompletionRequest"}}}


@router.post(
    "/v1/completions",
    dependencies=[Depends(check_media_type), Depends(check_declared_length), Depends(request_slot)],
    openapi_extra={"requestBody": {"required": True, "content": BODY}},
    responses={200: {"content": {"application/json": {}, "text/event-stream": {}}}},
    response_class=Response,
)
async def create_completion(request: Request) -> Response:
    """Complete one or more prompts, as JSON or, with `stream`, as server-sent events."""
    arrived = time.monotonic()
    state = request.app.state
    pool: WorkerPool = state.pool
    parsed = parse_completion(await read_body(request))
    assert pool.model is not None
    assert pool.codec is not None
    job = await Admission(state.config, pool.model, pool.codec).admit(parsed, arrived=arrived)
    generation = Generation(pool, job, state.fingerprint)
    if parsed.stream:
        return EventStreamResponse(generation)
    body = await collect_while_connected(request, generation)
    return Response(msgspec.json.encode(body), media_type="application/json")
