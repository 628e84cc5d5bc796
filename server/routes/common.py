"""What the routes that read a body share: the gates before it, its place in the document, admission."""

from typing import Any

from fastapi import Depends
from pydantic import BaseModel
from starlette.requests import Request

from server.admission import Admission
from server.limits import check_declared_length, check_media_type, request_slot
from server.pool import WorkerPool

GATES = [Depends(check_media_type), Depends(check_declared_length), Depends(request_slot)]


def body_of(kind: type[BaseModel]) -> dict[str, Any]:
    """For `openapi_extra`: handlers read bytes, so the document is told of the body."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


def admission_of(request: Request) -> Admission:
    """Behind the gates a pair is loaded. What one key's prompts leave in the caches serves no other key."""
    pool: WorkerPool = request.app.state.pool
    assert pool.model is not None
    assert pool.codec is not None
    key = getattr(request.state, "key_digest", "")
    return Admission(request.app.state.config, pool.model, pool.codec, pool.template, cache_salt=key)
