"""Passes replayed from graphs give what the passes themselves give; what is kept in place stays in place."""

import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from decoding import Engine, ModelPair
from decoding.graphs import Graph, Shape, _at_least, _doubling, _relative_error
from decoding.kv_cache import LENGTH_BUCKET
from decoding.model import CausalModel
from decoding.token_tree import TokenTree
from tests.decoding import test_adaptive_engine as adaptive_engine
from tests.decoding.checkpoints import VOCAB_SIZE, random_model
from tests.decoding.tape import TapeRecorder, with_graphs
from tests.decoding.test_model import tree_of
from tests.decoding.tiny import METHODS, Text, causal, drain, llama_pair, request, tiny_gpt2, tiny_llama

LENGTHS = [5, 60, 0, 17, 2]


@pytest.fixture(scope="module")
def plain_pair() -> ModelPair:
    return llama_pair(rows=6)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return with_graphs(llama_pair(rows=6))


def assert_same(found: dict[str, Text], expected: dict[str, Text]) -> None:
    assert found.keys() == expected.keys()
    for name, text in expected.items():
        assert found[name].token_ids == text.token_ids
        assert found[name].log_probs == pytest.approx(text.log_probs, abs=1e-9)


def num_graphs(pair: ModelPair) -> int:
    graphs = [model.graphs for model in pair.models.values() if model.graphs is not None]
    assert all(each.enabled for each in graphs)
    return sum(map(len, graphs))


def texts(pair: ModelPair, *methods: Any, **fields: Any) -> dict[str, Text]:
    """More texts than rows, of different lengths, so that rows join, leave and move."""
    engine = Engine(pair, 5, prefill_chunk=4)
    for number in range(6):
        settings = {"max_tokens": 4 + 2 * number, "seed": number, "ignore_eos": True, **fields}
        method = methods[number % len(methods)]
        engine.add(request(str(number), [number + 1] * (1 + 2 * number), method, **settings))
    return drain(engine, check=True)


@pytest.mark.parametrize("method", METHODS)
def test_text_is_the_same_with_graphs(method: str, pair: ModelPair, plain_pair: ModelPair) -> None:
    """Joins, leaves and moves included; what a method holds over several passes is its own."""
    fields = {"temperature": 0.9, "top_k": 8}
    assert_same(texts(pair, method, **fields), texts(plain_pair, method, **fields))
    assert num_graphs(pair)


def test_groups_side_by_side_do_not_touch_each_other(pair: ModelPair, plain_pair: ModelPair) -> None:
    methods = ("mmtad", "target", "multi_candidate")
    before = num_graphs(pair)
    assert_same(texts(pair, *methods, temperature=0), texts(plain_pair, *methods, temperature=0))
    assert num_graphs(pair) >= before


def test_shapes_that_change_from_step_to_step(pair: ModelPair, plain_pair: ModelPair) -> None:
    """Gaps of the draft are closed between them."""

    def run(pair: ModelPair) -> dict[str, Text]:
        sequences = [
            adaptive_engine.adaptive(str(n), [n, 3], "mmtad", max_tokens=20, seed=n, ignore_eos=True)
            for n in range(3)
        ]
        engine = Engine(pair, 5, policy=adaptive_engine.Scripted())
        for sequence in sequences:
            engine.add(sequence)
        return drain(engine, check=True)

    assert_same(run(pair), run(plain_pair))


def mistral() -> Any:
    return random_model("mistral", sliding_window=4).double()


class Twins:
    """The same model twice, once with graphs, over caches of the same random columns."""

    def __init__(self, module: Callable[[], Any], recorder: Any = None) -> None:
        settings = {"vocab_size": VOCAB_SIZE if module is mistral else 24, "rows": 6}
        self.plain, self.replaying = (causal(module(), **settings) for _ in range(2))
        self.graphs = self.replaying.use_graphs(recorder or TapeRecorder())
        self.plain.cache.storage.normal_()
        self.replaying.cache.storage.copy_(self.plain.cache.storage)
        for model in (self.plain, self.replaying):
            model.cache.lengths[:5] = LENGTHS

    def equal(self, run: Callable[[CausalModel], Tensor]) -> Tensor:
        """Both run the same; logits and every column but trash are equal. Returns the replayed logits."""
        expected, found = run(self.plain), run(self.replaying)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        kept = slice(0, self.plain.cache.trash_column)
        stored = [model.cache.storage[:, :, :, :, kept] for model in (self.plain, self.replaying)]
        torch.testing.assert_close(stored[1], stored[0], rtol=0, atol=1e-9)
        assert self.replaying.cache.storage.isfinite().all()
        return found


def trees(rows: slice, seed: int) -> Callable[[CausalModel], Tensor]:
    tree, _ = tree_of(random.Random(seed), [[seed + row] for row in range(rows.start, rows.stop)])
    return lambda model: model.forward(rows, torch.tensor(LENGTHS[rows]), tree)


@pytest.mark.parametrize("module", [tiny_llama, tiny_gpt2, mistral])
def test_pass_leaves_what_it_leaves_without_graphs(module: Callable[[], Any]) -> None:
    """Rows from the first on and in the middle, fewer and more, twice each: no trace of those before."""
    twins = Twins(module)
    for rows in (slice(0, 3), slice(0, 4), slice(1, 4), slice(0, 2), slice(0, 5), slice(0, 3)):
        for seed in (1, 2):
            twins.equal(trees(rows, seed))
        ids = torch.tensor([[3 + row, 4 + row] for row in range(rows.start, rows.stop)])
        lengths = torch.tensor(LENGTHS[rows])
        twins.equal(lambda model, rows=rows, lengths=lengths, ids=ids: model.catch_up(rows, lengths, ids))
    assert len(twins.graphs) == 6  # of 2, 4 and 5 rows, tree and catch-up


def test_logits_of_all_passes_lie_in_one_place() -> None:
    """Why a caller that needs them for longer must copy them."""
    twins = Twins(tiny_llama)
    large, small = trees(slice(0, 4), 1), trees(slice(0, 2), 2)
    first = twins.equal(large)
    before = first.clone()
    second = twins.equal(small)
    assert second.data_ptr() == first.data_ptr()
    assert not torch.equal(first, before)
    assert twins.equal(large).data_ptr() == first.data_ptr()


def test_a_group_far_behind_others_is_run_as_it_is() -> None:
    twins = Twins(tiny_llama)
    twins.equal(trees(slice(3, 5), 1))
    assert len(twins.graphs) == 0


def test_prompts_and_gaps_are_run_as_they_are() -> None:
    twins = Twins(tiny_llama)
    twins.equal(lambda model: model.prefill(2, [1, 2, 3]))
    chain = TokenTree.chain_of(torch.tensor([[1, 2, 3, 4]]))
    twins.equal(lambda model: model.forward(slice(0, 1), torch.tensor([LENGTHS[0]]), chain, keep=1))
    assert len(twins.graphs) == 0


def test_not_more_graphs_than_the_bound() -> None:
    twins = Twins(tiny_llama)
    twins.graphs._most = 1
    for rows in (slice(0, 2), slice(0, 4), slice(0, 2)):
        twins.equal(trees(rows, 1))
    assert len(twins.graphs) == 1


def test_the_row_of_prompts_is_never_padding() -> None:
    graphs = Twins(tiny_llama).graphs
    assert graphs.row_buckets == [1, 2, 4, 5]


def test_passes_of_too_many_tokens_do_not_fit() -> None:
    graphs = Twins(tiny_llama).graphs
    assert graphs.fits(Shape(64, 17, 64, 1))
    assert not graphs.fits(Shape(64, 18, 64, 1))


class Raises:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        raise self.error


class EndsAnew(Raises):
    """As the end of a recording does that something broke."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        try:
            return super().record(work)
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


class ForgetsInputs:
    """Replays the logits of the first pass."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return lambda: None


class ReadsTheDevice(TapeRecorder):
    """Stands for a model whose pass depends on values."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        def reading() -> None:
            work()
            assert torch.ones(()).item()

        return super().record(reading)


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [
        (Raises(RuntimeError("operation not permitted\nwhen capturing")), "not permitted when capturing"),
        (EndsAnew(TypeError("no such kernel")), "TypeError: no such kernel"),
        (ForgetsInputs(), "is off by"),
        (ReadsTheDevice(), "_local_scalar_dense"),
    ],
    ids=["raises", "ends anew", "differs", "reads"],
)
def test_a_graph_that_fails_ends_the_use_of_graphs(
    recorder: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With one warning; the passes go on, those of the failure too."""
    twins = Twins(tiny_llama, recorder)
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            twins.equal(trees(slice(0, 3), seed))
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert not twins.graphs.enabled
    assert len(twins.graphs) == 0
    assert twins.graphs.live_length(LENGTH_BUCKET) == LENGTH_BUCKET


@pytest.mark.parametrize("kind", [Raises, EndsAnew])
def test_out_of_memory_ends_recording_but_keeps_graphs(
    kind: type[Raises], caplog: pytest.LogCaptureFixture
) -> None:
    twins = Twins(tiny_llama)
    twins.equal(trees(slice(0, 2), 1))
    twins.graphs._recorder = kind(torch.OutOfMemoryError("CUDA out of memory"))
    with caplog.at_level(logging.WARNING):
        for rows in (slice(0, 4), slice(0, 5), slice(0, 2)):
            twins.equal(trees(rows, 2))
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "no memory for more than 1 graphs"
    ]
    assert (len(twins.graphs), twins.graphs.enabled) == (1, True)


def test_padding_is_put_back_only_where_rows_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    twins, padded = Twins(tiny_llama), []
    original = Graph._fill

    def fill(graph: Graph, rows: slice, inputs: Any) -> None:
        padded.append(rows != graph._filled)
        original(graph, rows, inputs)

    monkeypatch.setattr(Graph, "_fill", fill)
    for rows in (slice(0, 3), slice(0, 3), slice(0, 4), slice(0, 3)):
        twins.equal(trees(rows, 1))
    assert padded == [True, False, False, False, True, True]


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (1, 1, [1]),
        (1, 6, [1, 2, 4, 6]),
        (1, 16, [1, 2, 4, 8, 16]),
        (1, 17, [1, 2, 4, 8, 17]),
        (512, 4224, [512, 1024, 2048, 4224]),
        (192, 192, [192]),
        (512, 640, [512, 640]),
    ],
)
def test_buckets(first: int, last: int, expected: list[int]) -> None:
    assert _doubling(first, last) == expected
    assert all(_at_least(expected, value) >= value for value in range(1, last + 1))


def test_error_counts_what_differs() -> None:
    nan, inf = float("nan"), float("inf")
    expected = torch.tensor([[[1.0, -2.0, nan, -inf]], [[0.0, 1.0, 2.0, 4.0]]])
    assert _relative_error(expected.clone(), expected) == 0
    found = expected.clone()
    found[1, 0, 0] = 0.4
    assert _relative_error(found, expected) == pytest.approx(0.1)
    for place, value in ((3, 0.0), (0, nan), (2, 1.0)):
        found = expected.clone()
        found[0, 0, place] = value
        assert not _relative_error(found, expected) <= 1
