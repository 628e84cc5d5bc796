"""What is recorded before there is work is what the steps then replay, and leaves no trace."""

from typing import Any

import pytest

from decoding import DecodingConfig, Engine, ModelPair, record_graphs
from decoding import graph_warmup as module
from decoding.graph_warmup import needed_kinds
from decoding.methods import METHODS_BY_NAME
from tests.decoding.tape import TapeRecorder
from tests.decoding.tiny import METHODS, drain, llama_pair, request

CONFIG = {"num_speculative_tokens": 3, "beam_width": 2, "candidates_per_level": (3, 2)}


def sizes(pair: ModelPair) -> list[int]:
    return [0 if model.graphs is None else len(model.graphs) for model in pair.models.values()]


@pytest.mark.parametrize("method", METHODS)
def test_steps_find_all_their_graphs(method: Any) -> None:
    pair = llama_pair(rows=3)
    num_recorded = record_graphs(pair, DecodingConfig(method=method, **CONFIG), TapeRecorder())
    before = sizes(pair)
    assert num_recorded == sum(before) > 0
    for model in pair.models.values():
        assert not model.cache.storage.any()
        assert not any(model.cache.lengths)
    engine = Engine(pair, 2)
    for n in range(3):
        engine.add(request(str(n), [n, 5], method, max_tokens=9, ignore_eos=True, **CONFIG))
    drain(engine, check=True)
    assert sizes(pair) == before


def test_an_adaptive_config_needs_all_its_shapes() -> None:
    config = DecodingConfig(method="mmtad", adaptive=True)
    assert needed_kinds("target", config)[:4] == [(1, 1), (2, 2), (3, 3), (5, 5)]
    assert (17, 17) in needed_kinds("target", config)
    assert needed_kinds("draft", config) == [(2, 1), (1, 1), (2, 2), (4, 4)]


def test_every_method_is_known() -> None:
    for method in METHODS_BY_NAME:
        role = "draft" if method == "draft" else "target"
        assert (1, 1) in needed_kinds(role, DecodingConfig(method=method))  # type: ignore[arg-type]


def test_at_most_so_many_and_the_largest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most probable are chosen, short texts and few rows; a pool then serves the largest first."""
    monkeypatch.setattr(module, "MOST_AT_START", 4)
    pair, recorder = llama_pair(rows=9, max_model_len=600), TapeRecorder()
    assert record_graphs(pair, DecodingConfig(method="target"), recorder) == 4
    assert pair.target.graphs is not None
    assert [shape.rows for shape in pair.target.graphs._graphs] == [8, 4, 2, 1]
    assert {shape.live for shape in pair.target.graphs._graphs} == {512}


def test_without_a_recorder_a_cpu_has_no_graphs() -> None:
    pair = llama_pair(rows=3)
    assert record_graphs(pair, DecodingConfig()) == 0
    assert all(model.graphs is None for model in pair.models.values())


def test_a_model_that_several_processes_hold_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = llama_pair(rows=3)
    monkeypatch.setattr(pair.target, "ranks", 2)
    assert record_graphs(pair, DecodingConfig(method="mmtad", **CONFIG), TapeRecorder()) > 0
    assert pair.target.graphs is None
    assert pair.draft is not None
    assert pair.draft.graphs is not None
