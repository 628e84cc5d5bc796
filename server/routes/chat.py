"""`POST /v1/chat/completions`."""

import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.chat_schemas import ChatRequest
from server.generation import Generation
from server.limits import read_body
from server.routes.common import GATES, admission_of, body_of
from server.shapes import ChatShape
from server.streaming import respond
from server.validation import parse_chat

router = APIRouter(tags=["chat"])


@router.post(
    "/v1/chat/completions",
    dependencies=GATES,
    openapi_extra=body_of(ChatRequest),
    response_class=Response,
)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, as JSON or, with `stream`, as server-sent events."""
    arrived = time.monotonic()
    parsed = parse_chat(await read_body(request))
    job = await admission_of(request).admit_chat(parsed, arrived=arrived)
    state = request.app.state
    return await respond(request, Generation(state.pool, job, state.fingerprint, ChatShape()))
