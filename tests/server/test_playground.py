"""The page and its files: complete, closed to the rest of the web, open without a key."""

import re

import pytest

from server.routes.playground import FOLDER
from tests.server.conftest import Serve, Served
from tests.server.test_bad_input import check_error

PARTS = sorted(file.name for file in FOLDER.iterdir() if file.name != "index.html")


async def test_the_page_names_files_that_are_there(served: Served) -> None:
    page = await served.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    named = set(re.findall(r'(?:href|src)="([^"]+)"', page.text))
    assert {"playground/main.js", "playground/style.css"} <= named
    for name in named:
        assert (await served.client.get(f"/{name}")).status_code == 200, name


@pytest.mark.parametrize("name", PARTS)
async def test_every_part_has_its_type_and_asks_nobody_else(served: Served, name: str) -> None:
    response = await served.client.get(f"/playground/{name}")
    kind = response.headers["content-type"].partition(";")[0]
    assert kind == {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}[name.split(".")[1]]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"https?://", response.text.replace("http://www.w3.org/2000/svg", ""))
    for imported in re.findall(r'from "\./([^"]+)"', response.text):
        assert imported in PARTS


async def test_the_policy_allows_nothing_inline_and_nobody_else(served: Served) -> None:
    policy = (await served.client.get("/")).headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy


async def test_open_where_keys_are_asked_for(serve: Serve) -> None:
    async with serve(api_key=["key"]) as served:
        for path in ("/", *(f"/playground/{name}" for name in PARTS)):
            assert (await served.client.get(path)).status_code == 200
        assert (await served.client.get("/v1/models")).status_code == 401


@pytest.mark.parametrize("name", ["nope.js", "index.html", "..%2fapp.py", "%2e%2e/app.py", ""])
async def test_nothing_else_is_served(served: Served, name: str) -> None:
    check_error(await served.client.get(f"/playground/{name}"), 404, None, None)
