"""`GET /v1/models` and `GET /v1/models/{id}`: the target first, then the draft."""

from typing import Literal

from fastapi import APIRouter
from starlette.requests import Request

from server.admission import model_not_found
from server.config import ServerConfig
from server.pool import WorkerPool
from server.response_schemas import Model, ModelList

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(request: Request) -> ModelList:
    return ModelList(object="list", data=_models(request))


@router.get("/v1/models/{model_id:path}")
async def get_model(request: Request, model_id: str) -> Model:
    for model in _models(request):
        if model.id == model_id:
            return model
    raise model_not_found()


def _models(request: Request) -> list[Model]:
    config: ServerConfig = request.app.state.config
    pool: WorkerPool = request.app.state.pool
    max_model_len = pool.model.max_model_len if pool.model else config.max_model_len
    root = config.model or config.target_id
    targets = (config.target_id, *config.target_aliases)
    roots: dict[str, tuple[str, Literal["target", "draft"]]] = dict.fromkeys(targets, (root, "target"))
    if config.draft_id is not None:
        roots.setdefault(config.draft_id, (config.draft_id, "draft"))
    return [
        Model(
            id=name,
            object="model",
            created=pool.created,
            owned_by="mmtad",
            root=root,
            role=role,
            max_model_len=max_model_len,
        )
        for name, (root, role) in roots.items()
    ]
