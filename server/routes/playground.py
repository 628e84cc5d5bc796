"""`GET /`: the page to try the server on, and the files it is made of."""

from pathlib import Path

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

FOLDER = Path(__file__).parent.parent / "playground"
MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> FileResponse:
    return FileResponse(FOLDER / "index.html", headers=HEADERS)


@router.get("/playground/{name}")
def part(name: str) -> FileResponse:
    """Scripts, styles and the icon; needs no key, as the page itself."""
    files = {file.name: file for file in FOLDER.iterdir() if file.suffix in MEDIA_TYPES}
    if name not in files:
        raise HTTPException(404)
    return FileResponse(files[name], media_type=MEDIA_TYPES[files[name].suffix], headers=HEADERS)
