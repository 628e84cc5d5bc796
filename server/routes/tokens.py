"""`POST /tokenize` and `POST /detokenize`, in vLLM's shapes."""

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.admission import Admission
from server.chat_schemas import DetokenizeRequest, TokenizeRequest
from server.errors import InvalidRequestError
from server.limits import read_body
from server.pool import WorkerPool
from server.routes.common import GATES, admission_of, body_of
from server.text import TextCodec
from server.validation import check_messages, parse

router = APIRouter(tags=["tokens"])


@router.post("/tokenize", dependencies=GATES, openapi_extra=body_of(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """Token ids of a text, or of a conversation as the chat template writes it."""
    parsed = parse(TokenizeRequest, await read_body(request))
    admission = admission_of(request)
    if parsed.model is not None:
        admission.served_model(parsed.model)
    pool: WorkerPool = request.app.state.pool
    assert pool.model is not None
    assert pool.codec is not None
    token_ids = await _token_ids(admission, pool.codec, parsed)
    strings = await asyncio.to_thread(pool.codec.strings, token_ids) if parsed.return_token_strs else None
    return _json(
        {
            "count": len(token_ids),
            "max_model_len": pool.model.max_model_len,
            "tokens": token_ids,
            "token_strs": strings,
        }
    )


def _json(body: dict[str, Any]) -> Response:
    """Written at once: what walks over a million tokens in Python holds up everybody."""
    return Response(msgspec.json.encode(body), media_type="application/json")


async def _token_ids(admission: Admission, codec: TextCodec, parsed: TokenizeRequest) -> list[int]:
    """Special tokens are added to a text unless asked not to; a template writes its own."""
    special = parsed.add_special_tokens
    if (parsed.prompt is None) == (parsed.messages is None):
        message = "'prompt' or 'messages' is required, and only one of them."
        code = "missing_required_parameter" if parsed.prompt is None else "invalid_value"
        raise InvalidRequestError(message, code=code, param="prompt")
    if parsed.messages is None:
        (token_ids,) = await codec.encode([parsed.prompt or ""], add_special_tokens=special is not False)
        return token_ids
    check_messages(parsed.messages)
    return await admission.encode_chat(
        parsed.messages,
        add_generation_prompt=parsed.add_generation_prompt is not False,
        add_special_tokens=bool(special),
    )


@router.post("/detokenize", dependencies=GATES, openapi_extra=body_of(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of token ids, special ones among them."""
    parsed = parse(DetokenizeRequest, await read_body(request))
    admission = admission_of(request)
    if parsed.model is not None:
        admission.served_model(parsed.model)
    admission.check_ids("tokens", parsed.tokens)
    pool: WorkerPool = request.app.state.pool
    assert pool.codec is not None
    text = await asyncio.to_thread(pool.codec.decode, parsed.tokens, skip_special_tokens=False)
    return _json({"prompt": text})
