"""Every bad input has its exact status, code and param, from a real server over a real socket."""

import pytest

from tests.contract.cases import Case, World
from tests.contract.rows import CASES
from tests.e2e.conftest import RunningServer

pytestmark = pytest.mark.slow

REFERENCE = {"model": "tiny", "prompt": "The quick brown", "temperature": 0, "max_tokens": 24, "seed": 0}


@pytest.fixture(scope="module")
def reference(server: RunningServer) -> str:
    """What a well-behaved client was told before anybody misbehaved."""
    return ask(server)


def ask(server: RunningServer) -> str:
    with server.client() as client:
        text: str = client.post("/v1/completions", json=REFERENCE).json()["choices"][0]["text"]
        return text


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.row}: {case.name[:60]}")
def test_row(case: Case, request: pytest.FixtureRequest) -> None:
    case.run(World(request))


def test_no_row_is_missing() -> None:
    assert sorted({case.row for case in CASES}) == list(range(1, 58))


def test_the_reference_prompt_is_unchanged(server: RunningServer, reference: str) -> None:
    assert ask(server) == reference
