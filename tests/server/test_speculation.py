"""Whose shape may change from step to step: what a request fixes, it gets."""

from typing import Any

import pytest

from server.config import ServerConfig
from server.schemas import SpeculativeOptions
from server.speculation import Speculation, applied
from server.speculative_config import SpeculativeConfig
from tests.server.conftest import Served

TARGET = "SmolLM2-135M-Instruct"


def adapts(method: str | None = None, *, seeded: bool = False, server: Any = None, **options: Any) -> bool:
    config = ServerConfig(speculative_config=SpeculativeConfig(**(server or {})))
    speculation = Speculation(config, has_draft=True)
    sent = SpeculativeOptions(method=method, **options)  # type: ignore[arg-type]
    decoding = speculation.resolve(sent, TARGET, off=False, greedy=False, seeded=seeded)
    assert applied(decoding).get("adaptive", False) == decoding.adaptive
    return decoding.adaptive


def test_what_says_nothing_adapts() -> None:
    assert adapts()
    assert adapts(acceptance_reference="draft", metrics="detailed")
    assert adapts("speculative", acceptance="block")


@pytest.mark.parametrize("method", ["speculative", "mtad", "mmtad"])
def test_methods_that_adapt(method: str) -> None:
    assert adapts(method)


@pytest.mark.parametrize("method", ["target", "draft", "multi_candidate", "mtjd"])
def test_methods_that_never_adapt(method: str) -> None:
    assert not adapts(method)


@pytest.mark.parametrize(
    "own", [{"num_speculative_tokens": 4}, {"beam_width": 2}, {"acceptance_threshold": 0.5}]
)
def test_own_numbers_are_kept(own: dict[str, Any]) -> None:
    assert not adapts(**own)


def test_numbers_that_the_method_does_not_use_change_nothing() -> None:
    assert adapts("speculative", beam_width=2, acceptance_threshold=0.1)


def test_a_seed_fixes_and_so_does_the_server() -> None:
    assert not adapts(seeded=True)
    assert not adapts(server={"adaptive": False})


async def test_response_says_what_ran(served: Served) -> None:
    body = (await served.complete(seed=None, max_tokens=7, speculative={"metrics": "detailed"})).json()
    metrics = body["metrics"]
    assert metrics["speculative"]["adaptive"]
    assert metrics["speculative"]["presets"] == {"mmtad-4x4": 3}
    assert metrics["speculative_decoding"]["preset_per_step"] == ["mmtad-4x4"] * 3
    assert served.engine.added[0].config.adaptive


async def test_seeded_request_is_fixed(served: Served) -> None:
    metrics = (await served.complete(seed=3)).json()["metrics"]
    assert not metrics["speculative"]["adaptive"]
    assert "presets" not in metrics["speculative"]
    assert not served.engine.added[0].config.adaptive
