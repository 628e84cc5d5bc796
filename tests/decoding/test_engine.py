"""The engine: what it delivers does not depend on neighbours, ends where it must, and leaves no trace."""

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import _disable_current_modes

from decoding import Engine, FinishReason, ModelPair, Sequence, SequenceOutput
from decoding import group_step as group_step_module
from decoding.batch import sequence_end_ids
from decoding.group_step import GroupStepper
from decoding.host import to_host
from decoding.token_tree import TokenTree
from tests.decoding.host_reads import NoHostReads
from tests.decoding.laws import ADJUSTING, greedy_text, of_chain
from tests.decoding.tiny import (
    LOSSLESS,
    METHODS,
    VOCAB,
    Text,
    always,
    batch_of,
    drain,
    generate,
    llama_pair,
    make_pair,
    perturbed,
    plain,
    random_markov,
    request,
    scripted_pair,
    tiny_gpt2,
    tiny_llama,
)

TRANSFORMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.3, "min_p": 0.1, "top_k": 12},
    {"temperature": 0, **ADJUSTING["all"]},
    {"temperature": 0.8, "top_k": 15, **ADJUSTING["all"]},
]
LOSSLESS_SETTINGS: dict[str, dict[str, Any]] = {"target": {"method": "target"}, **LOSSLESS}
SEEDS = st.integers(-(2**63), 2**63 - 1)
TOKENS = st.integers(0, VOCAB - 1)
PENALTIES = st.sampled_from([0.0, 0.0, -2.0, 0.3, 2.0])
FIELDS = st.fixed_dictionaries(
    {
        "prompt": st.lists(TOKENS, min_size=1, max_size=9),
        "method": st.sampled_from(METHODS),
        "num_speculative_tokens": st.integers(1, 4),
        "beam_width": st.integers(1, 5),
        "acceptance_threshold": st.sampled_from([0.0, 0.3, 0.9, 1.0, math.inf]),
        "acceptance_reference": st.sampled_from(["draft", "target"]),
        "acceptance": st.sampled_from(["token", "block"]),
        "candidates_per_level": st.sampled_from([(2,), (3, 2), (4, 2, 2), (1, 1, 1, 2)]),
        "replacement": st.booleans(),
        "max_tokens": st.integers(0, 12),
        "min_tokens": st.integers(0, 14),
        "temperature": st.sampled_from([0.0, 1e-4, 0.7, 1.0, 2.0]),
        "top_k": st.sampled_from([-1, 0, 1, 3, VOCAB, 1000]),
        "top_p": st.sampled_from([0.0, 0.5, 0.9, 1.0, 1.0]),
        "min_p": st.sampled_from([0.0, 0.0, 0.2, 1.0]),
        "seed": SEEDS,
        "choice": st.integers(0, 3),
        "stop_token_ids": st.sampled_from([(), (5,), (5, 9), (10**6,)]),
        "ignore_eos": st.booleans(),
        "presence_penalty": PENALTIES,
        "frequency_penalty": PENALTIES,
        "repetition_penalty": st.sampled_from([1.0, 1.0, 0.5, 2.0]),
        "logit_bias": st.lists(st.tuples(TOKENS, st.floats(-100, 100)), max_size=3).map(tuple),
        "num_top_log_probs": st.integers(0, 4),
        "prompt_log_probs": st.booleans(),
    }
)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    """Rotary and learned positions, 2 layers and 1, so that mixed-up caches show."""
    return make_pair(tiny_llama(), tiny_gpt2(seed=1), eos=(2,))


@pytest.fixture(scope="module")
def close_pair() -> ModelPair:
    return llama_pair(eos=(2,))


def random_request(rng: random.Random, name: str, **fixed: Any) -> Sequence:
    fields = rng.choice(TRANSFORMS) | {
        "max_tokens": rng.randint(1, 12),
        "seed": rng.randrange(1000),
        "num_speculative_tokens": rng.choice([2, 3]),
        "beam_width": rng.choice([2, 4]),
        "acceptance_threshold": rng.choice([0.0, 0.3, 0.5]),
        "acceptance_reference": rng.choice(["draft", "target"]),
        "acceptance": rng.choice(["token", "block"]),
        "candidates_per_level": rng.choice([(3,), (2, 2), (4, 2, 2)]),
        "replacement": rng.random() < 0.5,
        "num_top_log_probs": rng.choice([0, 3]),
        "ignore_eos": rng.random() < 0.5,
        "method": rng.choice(METHODS),
    }
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))]
    return request(name, prompt, **(fields | fixed))


def assert_caches_equal_recomputation(engine: Engine) -> None:
    """The next logits of every row in every cache equal a stock forward over its text, to 1e-10."""
    for row, sequence in enumerate(engine._rows.sequences):
        ids, rows = sequence.prompt_ids + sequence.output_ids, slice(row, row + 1)
        batch = batch_of([sequence])
        for role, model in engine.pair.models.items():
            method = sequence.config.method
            used = sequence.config.uses_draft if role == "draft" else sequence.config.uses_target
            if not used:
                continue
            if role == "draft" and method != "draft":
                logits = model.catch_up(rows, batch.lengths, batch.last_tokens)[0]
            else:
                logits = model.forward(rows, batch.lengths, TokenTree.of_roots(batch.roots, 1))[0, 0]
            expected = plain(model, ids)[-1]
            torch.testing.assert_close(logits.log_softmax(-1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("which", ["pair", "close_pair"])
def test_proof_05_caches_equal_recomputation_after_joins_and_leaves(
    which: str, request: pytest.FixtureRequest
) -> None:
    """70 steps or more of random accepts, joins, cancels; the draft's cache too, which lossless outputs hide.

    Guards a missing catch-up, a commit of the wrong path, a row moved without its columns.
    """
    rng = random.Random(3)
    engine, served = Engine(request.getfixturevalue(which), 6, prefill_chunk=4), Counter[str]()
    step = 0
    while step < 70 or min(served[method] for method in METHODS) < 3:  # turns hang on the clock
        step += 1
        assert step < 200, served
        while engine.num_running + engine.num_waiting < 6:
            name, length = f"{step}.{engine.num_running + engine.num_waiting}", rng.randint(8, 20)
            engine.add(random_request(rng, name, max_tokens=length, method=rng.choice(METHODS)))
        engine.step()
        served[str(engine.last_step.method)] += engine.last_step.num_sequences
        if rng.random() < 0.2 and engine.num_running:
            engine.cancel(rng.choice(engine._rows.sequences).id)
        engine.check_integrity()
        with torch.inference_mode():
            assert_caches_equal_recomputation(engine)


@pytest.mark.parametrize("method", METHODS)
def test_proof_05_log_probs_equal_a_plain_forward(method: str, close_pair: ModelPair) -> None:
    """Untransformed log-probs of every delivered token, of the model that serves, to 1e-10."""
    sequences = [
        request(str(n), [n + 3, 7, 1], method, max_tokens=20, seed=n, **fields)
        for n, fields in enumerate(TRANSFORMS)
    ]
    model = close_pair.models["draft" if method == "draft" else "target"]
    for sequence, text in zip(sequences, generate(close_pair, *sequences).values(), strict=True):
        ids = sequence.prompt_ids + text.token_ids
        expected = plain(model, ids)[len(sequence.prompt_ids) - 1 : -1].gather(
            1, torch.tensor(text.token_ids)[:, None]
        )
        torch.testing.assert_close(
            torch.tensor(text.log_probs, dtype=torch.float64), expected[:, 0], rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("fields", TRANSFORMS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_proof_06_text_does_not_depend_on_neighbours(
    method: str, fields: dict[str, Any], close_pair: ModelPair
) -> None:
    """Alone, among 8, and when neighbours of the same and of other methods are cancelled."""

    def one() -> Sequence:
        return request("one", [4, 9, 1, 5], method, max_tokens=20, seed=77, ignore_eos=True, **fields)

    rng = random.Random(f"{method} {fields}")
    alone = generate(close_pair, one())["one"]
    same = [random_request(rng, f"same {n}", method=method, max_tokens=15) for n in range(4)]
    mixed = [random_request(rng, f"mixed {n}", max_tokens=15) for n in range(3)]
    engine, texts = Engine(close_pair, 8), dict[str, Text]()
    for number, sequence in enumerate([*same[:2], *mixed, one(), *same[2:]]):
        engine.add(sequence)
        if number == 5:
            for output in engine.step():
                texts.setdefault(output.id, Text()).take(output)
    drain(engine, texts)
    assert texts["one"].token_ids == alone.token_ids
    assert texts["one"].log_probs == pytest.approx(alone.log_probs, abs=1e-9)
    assert [len(output.token_ids) for output in texts["one"].steps] == [
        len(output.token_ids) for output in alone.steps
    ]
    texts = {}
    for sequence in [random_request(rng, f"leaving {n}", method=method, max_tokens=30) for n in range(7)]:
        engine.add(sequence)
    engine.add(one())
    while engine.has_work():
        for output in engine.step():
            texts.setdefault(output.id, Text()).take(output)
        others = [each.id for each in engine._rows.sequences if each.id != "one"]
        if others:
            assert engine.cancel(rng.choice(others))
    assert texts["one"].token_ids == alone.token_ids


def countdown() -> ModelPair:
    """Token n is followed by n - 1, down to 0, which is EOS and is followed by 9."""
    cycle = torch.eye(10).roll(-1, 1) * 0.99 + 0.001
    return scripted_pair(cycle, cycle, eos=(0,))


@pytest.mark.parametrize("start", range(1, 10))
@pytest.mark.parametrize("method", METHODS)
def test_proof_07_eos_at_every_offset_of_a_block(method: str, start: int) -> None:
    """Nothing after the end is delivered, wherever in a block of 5 it falls."""
    text = generate(countdown(), request("a", [start], method, temperature=0, max_tokens=50))["a"]
    assert text.token_ids == list(range(start - 1, -1, -1))
    assert text.finish_reason is FinishReason.STOP
    assert text.steps[-1].stop_token_id == 0
    assert all(output.stop_token_id is None for output in text.steps[:-1])


@pytest.mark.parametrize("method", METHODS)
def test_ignored_eos_does_not_end_and_a_stop_id_does(method: str) -> None:
    sequence = request("a", [3], method, temperature=0, max_tokens=50, ignore_eos=True, stop_token_ids=(7, 5))
    text = generate(countdown(), sequence)["a"]
    assert text.token_ids == [2, 1, 0, 9, 8, 7]
    assert (text.finish_reason, text.steps[-1].stop_token_id) == (FinishReason.STOP, 7)


@pytest.mark.parametrize("reference", ["draft", "target"])
@pytest.mark.parametrize("method", METHODS)
def test_proof_07_frequent_eos_gives_short_texts(method: str, reference: str) -> None:
    """P(EOS) = 0.9 everywhere: mean length 1.11, not the 4 of a childless leaf beaten by longer junk."""
    probs = torch.full((6, 6), 0.02)
    probs[:, 0] = 0.9
    pair = scripted_pair(probs, probs, eos=(0,), rows=201)
    sequences = [
        request(str(n), [1], method, max_tokens=20, seed=n, acceptance_reference=reference)
        for n in range(200)
    ]
    lengths = [len(text.token_ids) for text in generate(pair, *sequences).values()]
    assert 1 <= sum(lengths) / len(lengths) < 1.35


def proposed_depth(method: str, left: int) -> int:
    """What a step may propose when `left` tokens remain, with the default numbers."""
    match method:
        case "target" | "draft":
            return 0
        case "mtjd":
            return min(4, left) - 1  # its last token counts as the target's own
        case "multi_candidate":
            return min(3, left - 1)
    return min(4, left - 1)


@pytest.mark.parametrize("max_tokens", range(1, 12))
@pytest.mark.parametrize("method", METHODS)
def test_proof_07_max_tokens_at_every_remainder(method: str, max_tokens: int, close_pair: ModelPair) -> None:
    """Never one more, never one less; the depth of the last step is cut before drawing."""
    sequence = request("a", [4, 9], method, max_tokens=max_tokens, seed=3, ignore_eos=True)
    text = generate(close_pair, sequence)["a"]
    assert len(text.token_ids) == max_tokens
    assert text.finish_reason is FinishReason.LENGTH
    left = max_tokens
    for output in text.steps:
        assert output.num_draft_tokens == proposed_depth(method, left)
        assert output.num_accepted_tokens <= output.num_draft_tokens
        left -= len(output.token_ids)


@pytest.mark.parametrize("method", LOSSLESS_SETTINGS.values(), ids=LOSSLESS_SETTINGS)
def test_lossless_text_is_a_prefix_of_a_longer_one(method: dict[str, Any], close_pair: ModelPair) -> None:
    """At temperature 0; joint methods promise no such thing."""
    fields = {"temperature": 0, "ignore_eos": True, **method}
    texts = [generate(close_pair, request("a", [4], max_tokens=n, **fields))["a"] for n in range(1, 10)]
    assert all(texts[-1].token_ids[: len(text.token_ids)] == text.token_ids for text in texts)


def countdown_past_eos() -> ModelPair:
    """Token n is followed by n - 1 down to EOS; where that is excluded, surely by 9."""
    probs = torch.full((10, 10), 1e-4)
    probs[:, 9] = 0.02
    probs += torch.eye(10).roll(-1, 1)
    probs /= probs.sum(1, keepdim=True)
    return scripted_pair(probs, probs, eos=(0,))


@pytest.mark.parametrize("min_tokens", range(12))
@pytest.mark.parametrize("start", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_proof_07_min_tokens_inside_a_block(method: str, start: int, min_tokens: int) -> None:
    """EOS and the stop id 8 come up at several offsets of a block; excluded up to the minimum, not after.

    Off by one either way shows: with the minimum just below, at and above where an end would come.
    """
    fields = {"temperature": 0, "max_tokens": 30, "min_tokens": min_tokens, "stop_token_ids": (8,)}
    sequence = request("a", [start], method, **fields)
    pair = countdown_past_eos()
    expected = greedy_text(of_chain(torch.tensor(pair_table(pair))), sequence, (0,))
    text = generate(pair, sequence)["a"]
    assert text.token_ids == expected
    assert min_tokens < len(text.token_ids) < 30
    assert text.finish_reason is FinishReason.STOP


def pair_table(pair: ModelPair) -> list[list[float]]:
    """The target's transition probabilities."""
    tokens = torch.arange(10)[None]
    table: list[list[float]] = pair.target.module.script(tokens, tokens)[0].exp().tolist()
    return table


@pytest.mark.parametrize("method", METHODS)
def test_proof_07_sampled_texts_reach_their_minimum(method: str) -> None:
    """P(EOS) = 0.9 everywhere: at the minimum plus 1 nearly all end."""
    probs = torch.full((6, 6), 0.02)
    probs[:, 0] = 0.9
    pair = scripted_pair(probs, probs, eos=(0,), rows=101)
    texts = generate(
        pair, *(request(str(n), [1], method, max_tokens=20, min_tokens=6, seed=n) for n in range(100))
    )
    lengths = [len(text.token_ids) for text in texts.values()]
    assert min(lengths) == 7
    assert sum(lengths) / 100 < 7.5


class Traffic:
    """Adds, cancels and steps as hypothesis says, and compares every text with what was promised."""

    def __init__(self, pair: ModelPair) -> None:
        self.engine = Engine(pair, 4, prefill_chunk=3)
        self.running: dict[str, Sequence] = {}
        self.texts: dict[str, Text] = {}

    def act(self, kind: str, value: Any) -> None:
        if kind == "add":
            self.add(value)
        elif kind == "cancel" and self.running:
            gone = sorted(self.running)[value % len(self.running)]
            del self.running[gone]
            assert self.engine.cancel(gone)
            assert not self.engine.cancel(gone)
        else:
            self.step()
        engine = self.engine
        engine.check_integrity()
        known = engine.num_running + engine.num_waiting + len(engine._outputs)
        assert known == len(self.running)
        assert engine.num_free_rows == 4 - engine.num_running
        assert all(0 <= share <= 1 for share in engine.cache_usage().values())

    def add(self, sequence: Sequence) -> None:
        self.engine.add(sequence)
        self.running[sequence.id] = sequence

    def run(self) -> None:
        """To the end of all."""
        for _ in range(2000):
            if not self.engine.has_work():
                break
            self.act("step", 0)
        assert not self.running
        models = self.engine.pair.models.values()
        assert not any(model.cache.lengths[row] for model in models for row in range(4))

    def step(self) -> None:
        for output in self.engine.step():
            assert output.id in self.running, "delivered after cancel or end"
            self.texts.setdefault(output.id, Text()).take(output)
            if output.finish_reason is not None:
                self.finish(self.running.pop(output.id), output)

    def finish(self, sequence: Sequence, output: SequenceOutput) -> None:
        text, params = self.texts[sequence.id], sequence.params
        token_ids = text.token_ids
        assert sequence.output_ids == token_ids
        ends = sequence_end_ids(sequence, (2,))
        assert not ends.intersection(token_ids[:-1])
        stopped = bool(ends.intersection(token_ids[-1:]))
        assert stopped == (output.finish_reason is FinishReason.STOP)
        assert stopped or len(token_ids) == params.max_tokens
        assert not stopped or len(token_ids) > params.min_tokens
        assert len(text.tops) == (len(token_ids) if params.num_top_log_probs else 0)
        assert all(len(top) == params.num_top_log_probs for top in text.tops)
        assert all(math.isfinite(value) and value < 1e-9 for value in text.log_probs)
        scored = None if text.prompt_log_probs is None else len(text.prompt_log_probs)
        assert scored == (len(sequence.prompt_ids) - 1 if params.prompt_log_probs else None)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), FIELDS),
            st.tuples(st.just("cancel"), st.integers(0, 999)),
            st.tuples(st.just("step"), st.just(0)),
            st.tuples(st.just("step"), st.just(0)),
        ),
        max_size=40,
    )
)
def test_proof_12_integrity_after_every_step_of_random_traffic(actions: list[tuple[str, Any]]) -> None:
    """Guards rows, lengths, groups, counts and device state that drift apart; nothing stays at the end."""
    traffic = Traffic(_traffic_pair())
    for number, (kind, value) in enumerate(actions):
        traffic.act(kind, request(id=str(number), **value) if kind == "add" else value)
    traffic.run()


@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(FIELDS, min_size=1, max_size=3), st.integers(1, 5))
def test_proof_12_a_thousand_mixed_batches(batch: list[dict[str, Any]], max_tokens: int) -> None:
    """Any fields beside any others: no exception, and every text ends as its request says."""
    traffic = Traffic(_traffic_pair())
    for number, fields in enumerate(batch):
        fields = fields | {"max_tokens": min(fields["max_tokens"], max_tokens)}
        traffic.act("add", request(id=str(number), **fields))
    traffic.run()


_PAIRS: list[ModelPair] = []


def _traffic_pair() -> ModelPair:
    if not _PAIRS:
        target = tiny_llama(num_hidden_layers=1)
        _PAIRS.append(make_pair(target, perturbed(target, 0.2), rows=5, max_model_len=32, eos=(2,)))
    return _PAIRS[0]


def test_choices_of_one_prompt_share_its_prefill(close_pair: ModelPair) -> None:
    """One prefill for three choices, whose texts differ and are those of the choices decoded alone."""
    prompt = [3, 8, 1, 4, 9, 2, 2, 7, 5, 6]

    def choice(index: int) -> Sequence:
        return request(str(index), prompt, "mmtad", choice=index, max_tokens=10, seed=5, ignore_eos=True)

    engine, prefilled, texts = Engine(close_pair, 8), 0, dict[str, Text]()
    for index in range(3):
        engine.add(choice(index))
    while engine.has_work():
        for output in engine.step():
            texts.setdefault(output.id, Text()).take(output)
        prefilled += engine.last_step.prefill_tokens
    assert prefilled == len(prompt) - 1
    assert len({tuple(text.token_ids) for text in texts.values()}) == 3
    for index in range(3):
        assert generate(close_pair, choice(index))[str(index)].token_ids == texts[str(index)].token_ids


@pytest.mark.parametrize("methods", [("target", "mmtad"), ("draft", "speculative"), ("mtad", "draft")])
def test_prefill_of_one_model_is_reused_by_a_method_that_needs_both(
    methods: tuple[str, str], close_pair: ModelPair
) -> None:
    prompt = [3, 8, 1, 4, 9, 2, 2, 7, 5, 6]
    fields = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    engine = Engine(close_pair, 4, prefill_chunk=4)
    for method in methods:
        engine.add(request(method, prompt, method, **fields))
    texts = drain(engine, check=True)
    for method in methods:
        assert (
            texts[method].token_ids
            == generate(close_pair, request("a", prompt, method, **fields))["a"].token_ids
        )


@pytest.mark.parametrize("chunk", [1, 3, 9, 256])
def test_prefill_takes_at_most_one_chunk_per_step_beside_decoding(chunk: int, close_pair: ModelPair) -> None:
    """A long prompt must not hold up those who decode, and its text is the same whatever the chunk."""
    long = request("long", [5, 9, 1, 7, 7, 3, 8, 20, 11, 6], temperature=0, max_tokens=6)
    expected = generate(close_pair, request("long", long.prompt_ids, temperature=0, max_tokens=6))["long"]
    engine = Engine(close_pair, 4, prefill_chunk=chunk)
    engine.add(request("first", [4], temperature=0, max_tokens=90, ignore_eos=True))
    engine.step()
    engine.add(long)
    steps = 0
    while engine.num_waiting:
        outputs = engine.step()
        steps += 1
        assert engine.last_step.prefill_tokens <= chunk
        assert any(output.id == "first" for output in outputs)
    assert steps >= math.ceil(9 / chunk)
    engine.cancel("first")
    drain(engine)
    assert long.output_ids == expected.token_ids


def poisoned(module: Any, token: int = 7) -> Any:
    """A model whose states are not numbers from `token` on, which it never draws by itself."""
    head = torch.nn.Linear(*reversed(module.get_output_embeddings().weight.shape)).double()
    with torch.no_grad():
        head.weight.copy_(module.get_output_embeddings().weight)
        head.bias.zero_()[token] = -1e3
        module.get_input_embeddings().weight[token] = math.nan
    module.set_output_embeddings(head)
    return module


@pytest.mark.parametrize(
    ("method", "role"),
    [
        ("target", "target"),
        ("draft", "draft"),
        ("mtjd", "target"),
        *(
            (method, role)
            for method in ("speculative", "multi_candidate", "mtad", "mmtad")
            for role in ("target", "draft")
        ),
    ],
)
def test_row_that_is_not_finite_ends_alone_and_leaves_no_trace(method: str, role: str) -> None:
    """Its neighbours' log-probs stay bit for bit; later sequences in its rows are not poisoned."""
    models = {"target": poisoned(tiny_llama()), "draft": poisoned(tiny_gpt2())}
    healthy = "draft" if role == "target" else "target"
    with torch.no_grad():
        models[healthy].get_input_embeddings().weight[7] = 0
    pair = make_pair(models["target"], models["draft"], rows=4)
    fields: dict[str, Any] = {"top_k": 3, "ignore_eos": True, "candidates_per_level": (2, 2, 1)}

    def run(third: Sequence) -> dict[str, Text]:
        engine = Engine(pair, 3)
        for name in ("a", "b"):
            engine.add(request(name, [1, 2, 3], method, seed=1, max_tokens=8, **fields))
        engine.add(third)
        return drain(engine, check=True)

    bad = request("c", [5, 6, 7, 1, 1, 1, 1, 1], method, max_tokens=9, **fields)
    texts = run(bad)
    assert texts["c"].finish_reason is FinishReason.ERROR
    assert texts["c"].token_ids == []
    expected = run(request("c", [5, 6, 6, 1, 1, 1, 1, 1], method, max_tokens=1, **fields))
    for name in ("a", "b"):
        assert texts[name].token_ids
        assert texts[name].finish_reason == expected[name].finish_reason
        assert texts[name].token_ids == expected[name].token_ids
        assert texts[name].log_probs == expected[name].log_probs
    for model in pair.models.values():
        assert model.cache.storage[:, :, :3].isfinite().all()
    later = generate(pair, request("later", [4], method, temperature=0, max_tokens=1))["later"]
    assert later.finish_reason is FinishReason.LENGTH
    assert model.cache.storage.isfinite().all()


def test_cancelled_row_that_was_never_decoded_leaves_no_trace() -> None:
    """Its prompt may hold values that no step has seen."""
    pair = make_pair(poisoned(tiny_llama()), tiny_gpt2(), rows=3)
    engine = Engine(pair, 2)
    engine.add(request("long", [1], "draft", max_tokens=9))
    engine.add(request("bad", [7, 7, 7, 7], "target"))
    engine.step()
    assert engine.num_running == 2
    assert engine.cancel("bad")
    engine.cancel("long")
    for name in ("a", "b"):
        engine.add(request(name, [1], "target", temperature=0, max_tokens=1))
    texts = drain(engine)
    assert {text.finish_reason for text in texts.values()} == {FinishReason.LENGTH}


def test_cancel_frees_at_once_wherever_the_sequence_is(pair: ModelPair) -> None:
    """Waiting, in the middle of its prefill, decoding, with nothing to do, unknown."""
    engine = Engine(pair, 1, prefill_chunk=2)
    engine.add(request("decoding", [3, 1], max_tokens=50, ignore_eos=True))
    engine.step()
    engine.add(request("waiting", [3, 1]))
    engine.add(request("nothing", [3, 1], max_tokens=0))
    assert (engine.num_running, engine.num_waiting, engine.num_free_rows) == (1, 1, 0)
    assert engine.cancel("waiting")
    assert engine.cancel("nothing")
    assert engine.num_waiting == 0
    assert engine.cancel("decoding")
    assert (engine.num_running, engine.num_free_rows, engine.has_work()) == (0, 1, False)
    engine.add(request("prefilling", [5, 6, 7, 8, 9, 10, 11], temperature=0))
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (0, 1)
    assert engine.cancel("prefilling")
    assert not engine.has_work()
    assert not engine.cancel("prefilling")
    engine.check_integrity()
    after = request("after", [5, 6, 7, 8, 9, 3, 11], temperature=0, max_tokens=5)
    engine.add(after)
    expected = generate(pair, request("after", after.prompt_ids, temperature=0, max_tokens=5))
    assert drain(engine)["after"].token_ids == expected["after"].token_ids


def test_max_tokens_zero_delivers_nothing(pair: ModelPair) -> None:
    text = generate(pair, request("a", [3], max_tokens=0))["a"]
    assert (text.token_ids, text.finish_reason) == ([], FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("prompt", "fields", "field"),
    [
        ([], {}, "prompt_ids"),
        ([3, VOCAB], {}, "prompt_ids"),
        ([-1, 3], {}, "prompt_ids"),
        ([3] * 90, {"max_tokens": 7}, "max_tokens"),
        ([3], {"id": "taken"}, "id"),
        ([3], {"logit_bias": ((VOCAB, 1.0),)}, "logit_bias"),
        ([3], {"logit_bias": ((-1, 1.0),)}, "logit_bias"),
        ([3], {"num_top_log_probs": VOCAB + 1}, "num_top_log_probs"),
    ],
)
def test_sequence_that_cannot_be_decoded_names_its_field(
    prompt: list[int], fields: dict[str, Any], field: str, pair: ModelPair
) -> None:
    engine = Engine(pair, 2)
    engine.add(request("taken", [3] * 90, max_tokens=6))
    with pytest.raises(ValueError, match=f"^{field} "):
        engine.add(request(**{"id": "new", "prompt": prompt, **fields}))
    assert engine.num_waiting == 1


@pytest.mark.parametrize("method", ["draft", "mmtad"])
def test_method_without_its_draft_names_its_field(method: str) -> None:
    engine = Engine(make_pair(always(2), vocab_size=6), 2)
    with pytest.raises(ValueError, match="^method 'm?m?t?a?d?(raft)?' needs a draft model"):
        engine.add(request("a", [1], method))


@pytest.mark.parametrize("method", METHODS)
def test_context_may_be_filled_to_its_last_position(method: str) -> None:
    """Learned positions end with the context; nodes that only pad a tree must not look beyond."""
    pair = make_pair(tiny_gpt2(), tiny_gpt2(seed=1), max_model_len=256, rows=3)
    long = request("long", [n % VOCAB for n in range(246)], method, max_tokens=10)
    texts = generate(pair, long, request("short", [3, 1], method, max_tokens=10))
    assert [len(text.token_ids) for text in texts.values()] == [10, 10]


def test_engine_needs_a_row_for_prefill(pair: ModelPair) -> None:
    with pytest.raises(ValueError, match="max_num_seqs must be under the 10 rows"):
        Engine(pair, 10)


def test_finished_id_may_be_used_again(pair: ModelPair) -> None:
    engine = Engine(pair, 2)
    for _ in range(2):
        engine.add(request("a", [3], max_tokens=2))
        drain(engine)


def test_presets_are_forgotten_with_their_last_row(pair: ModelPair) -> None:
    """A client can name thousands of them."""
    engine = Engine(pair, 2)
    for depth in range(1, 9):
        engine.add(request(str(depth), [4], "mmtad", max_tokens=2, num_speculative_tokens=depth))
        drain(engine)
    assert len(engine._turns._last_turn) <= 1
    assert len(engine._batches) <= 1


def test_round_robin_starves_no_group(pair: ModelPair) -> None:
    """Any three decode steps in a row serve all three groups, however many rows each has."""
    engine = Engine(pair, 9)
    for number, method in enumerate(["target"] * 5 + ["mmtad", "speculative"]):
        engine.add(request(str(number), [number + 3], method, max_tokens=60, ignore_eos=True))
    turns = []
    for step in range(12):
        engine.step()
        turns.append(engine.last_step.method)
        if step == 4:
            engine.add(request("late", [3], "target", max_tokens=60, ignore_eos=True))
    for start in range(10):
        assert set(turns[start : start + 3]) == {"target", "mmtad", "speculative"}


def test_new_group_is_served_in_its_first_step(pair: ModelPair) -> None:
    engine = Engine(pair, 4)
    for method in ("target", "mmtad"):
        engine.add(request(method, [3], method, max_tokens=60, ignore_eos=True))
        engine.step()
        assert engine.last_step.method == method
    engine.add(request("late", [3], "mtad", max_tokens=60))
    engine.step()
    assert engine.last_step.method == "mtad"


def test_step_statistics(pair: ModelPair) -> None:
    engine = Engine(pair, 4)
    for name in ("a", "b"):
        engine.add(
            request(name, [3, 4, 5, 6], "mmtad", beam_width=2, num_speculative_tokens=3, ignore_eos=True)
        )
    engine.step()
    stats = engine.last_step
    assert (stats.method, stats.num_sequences, stats.num_tree_nodes, stats.prefill_tokens) == (
        "mmtad",
        2,
        6,
        3,
    )
    assert 0 < stats.prefill_seconds < 60
    assert 0 < stats.decode_seconds < 60
    assert 0 < engine.cache_usage()["target"] == engine.cache_usage()["draft"] < 0.2
    for name in ("a", "b"):
        engine.cancel(name)
    engine.step()
    assert (engine.last_step.method, engine.last_step.num_sequences) == (None, 0)


@pytest.mark.parametrize("fields", [{}, ADJUSTING["all"] | {"temperature": 0.75}], ids=["none", "all"])
@pytest.mark.parametrize("method", METHODS)
def test_proof_11_retry_goes_on_with_the_same_text(
    method: str, fields: dict[str, Any], close_pair: ModelPair
) -> None:
    """A worker restarts after any step: what was delivered is prefilled, the next unused step drawn.

    Guards counts and lengths that start from nothing, and noise that is drawn a second time.
    """

    def one() -> Sequence:
        return request("a", [4, 9, 1], method, max_tokens=20, seed=6, ignore_eos=True, **fields)

    whole = generate(close_pair, one())["a"]
    for cut in (1, 2, len(whole.steps) - 1):
        resumed = one()
        for output in whole.steps[:cut]:
            resumed.output_ids += output.token_ids
            resumed.num_steps += 1
        delivered = len(resumed.output_ids)
        found = generate(close_pair, resumed)["a"]
        assert found.token_ids == whole.token_ids[delivered:]
        assert found.log_probs == pytest.approx(whole.log_probs[delivered:], abs=1e-9)
        assert resumed.output_ids == whole.token_ids


def unwatched(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with _disable_current_modes():
            return function(*args)

    return run


@pytest.mark.parametrize("method", METHODS)
def test_step_reads_nothing_from_the_device(
    method: str, close_pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA each such read would wait for the device; all that a step does but its one copy."""
    engine = Engine(close_pair, 8)
    for number, fields in enumerate(TRANSFORMS[1:]):
        settings = {"max_tokens": 30, "ignore_eos": True, "num_top_log_probs": number, **fields}
        engine.add(request(str(number), [number + 3, 5], method, **settings))
    engine.step()
    sequences = list(engine._rows.sequences)
    batch = batch_of(sequences)  # inference mode would hide what composite operations do
    monkeypatch.setattr(group_step_module, "to_host", unwatched(to_host))
    stepper = GroupStepper(close_pair, None)
    with torch.no_grad(), NoHostReads():
        for _ in range(2):
            stepper.step(sequences[0].config.preset, batch, sequences)


@pytest.mark.parametrize(
    "read",
    [
        lambda values: values[0].item(),
        lambda values: bool(values[0] > 1),
        lambda values: values[values > 1],
        lambda values: torch.where(values > 1),
        lambda values: torch.equal(values, values),
        lambda values: values + torch.tensor([1, 2, 3]),
    ],
)
def test_reads_would_be_noticed(read: Any) -> None:
    with NoHostReads(), pytest.raises(AssertionError):
        read(torch.arange(3))


def test_one_copy_to_the_host_per_step(close_pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """At batch 8, everything of a step comes in one buffer."""
    copies: list[torch.Size] = []

    def counted(values: torch.Tensor) -> list[Any]:
        copies.append(values.shape)
        return to_host(values)

    monkeypatch.setattr(group_step_module, "to_host", counted)
    engine = Engine(close_pair, 8)
    for number in range(8):
        engine.add(
            request(
                str(number),
                [number + 3, 1, 4],
                "mmtad",
                max_tokens=20,
                seed=number,
                ignore_eos=True,
                num_top_log_probs=number % 3,
                presence_penalty=number % 2,
            )
        )
    steps = 0
    while engine.has_work():
        engine.step()
        steps += engine.last_step.method is not None
        assert len(copies) == steps
    assert steps > 4


def test_memory_does_not_grow_with_steps(close_pair: ModelPair) -> None:
    """A device batch that kept its history would show as more live tensors after more steps."""
    engine = Engine(close_pair, 2)
    engine.add(request("a", [3], "mmtad", max_tokens=90, ignore_eos=True, presence_penalty=0.5))
    engine.step()
    (batch,) = engine._batches.values()

    def sizes() -> list[int]:
        parts = [getattr(each, name) for each in (batch, batch.adjustments) for name in each.__slots__]
        return [part.numel() for part in parts if torch.is_tensor(part)]

    before = sizes()
    for _ in range(10):
        engine.step()
    assert sizes() == before


def test_scripted_law_survives_mixed_traffic() -> None:
    """Markov chains of one law decoded by all lossless methods at once keep their impossible tokens out."""
    p = random_markov(5, 3, zeros=2)
    pair = scripted_pair(p, random_markov(5, 4), rows=9)
    settings = list(LOSSLESS_SETTINGS.values())
    sequences = [request(str(n), [1], max_tokens=40, seed=n, **settings[n % 5]) for n in range(8)]
    for text in generate(pair, *sequences).values():
        previous = 1
        for token in text.token_ids:
            assert p[previous, token] > 0
            previous = token
