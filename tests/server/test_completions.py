"""`POST /v1/completions`: what is generated is what is returned, collected or streamed."""

import json
from typing import Any

import httpx
import pytest

from tests.server.conftest import Serve, Served
from tests.server.fakes import BOS, EOS, ScriptedEngine, constant, ids_of

METHODS = ("target", "draft", "speculative", "multi_candidate", "mtjd", "mtad", "mmtad")
APPLIED: dict[str, dict[str, Any]] = {
    "target": {},
    "draft": {},
    "speculative": {"num_speculative_tokens": 4, "acceptance": "token", "adaptive": True},
    "multi_candidate": {"candidates_per_level": [4, 2, 2]},
    "mtjd": {"num_speculative_tokens": 4, "beam_width": 4},
}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The data of a stream's events; asserts that it ends with `[DONE]`."""
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def streamed_choices(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Text and end of each choice; asserts that each ends exactly once."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            entry = choices.setdefault(
                choice["index"], {"text": "", "finish_reason": None, "stop_reason": None}
            )
            assert entry["finish_reason"] is None
            entry["text"] += choice["text"]
            entry |= {key: choice[key] for key in ("finish_reason", "stop_reason")}
    return choices


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


async def test_response_has_every_field(served: Served) -> None:
    response = await served.complete(prompt="xyz", max_tokens=7, seed=5)
    assert response.status_code == 200
    body = response.json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    assert body["system_fingerprint"].startswith("mmtad-")
    assert body["choices"] == [
        {"index": 0, "text": "abcdefg", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert body["usage"] == usage(3, 7)
    metrics = body["metrics"]
    assert metrics["energy"] is None
    assert metrics["seed"] == 5
    assert metrics["target_logprob_mean"] == -0.5
    assert metrics["speculative"] == {
        "method": "mmtad",
        "num_speculative_tokens": 4,
        "beam_width": 4,
        "acceptance_threshold": 0.7,
        "acceptance_reference": "target",
        "adaptive": False,
    }
    assert metrics["time_to_first_token_ms"] > 0


async def test_speculation_sums_reconcile(served: Served) -> None:
    body = (await served.complete(max_tokens=7, speculative={"metrics": "detailed"})).json()
    speculation = body["metrics"]["speculative_decoding"]
    histogram = speculation["acceptance_histogram"]
    assert histogram == [1, 0, 2, 0, 0]  # steps of 3, 3 and 1 tokens
    assert sum(histogram) == speculation["num_spec_steps"] == 3
    assert (
        sum(n * count for n, count in enumerate(histogram)) == speculation["num_accepted_draft_tokens"] == 4
    )
    assert speculation["num_draft_tokens"] == 12
    assert speculation["num_spec_tokens"] == 4
    assert speculation["mean_acceptance_length"] == pytest.approx(1 + 4 / 3)
    assert speculation["draft_acceptance_rate"] == pytest.approx(4 / 12)
    assert speculation["accepted_tokens_per_step"] == [2, 2, 0]
    assert speculation["num_draft_nodes"] == [4, 4, 4]


@pytest.mark.parametrize(("detail", "shown"), [("none", False), ("summary", True), (None, True)])
async def test_speculation_metrics_level(served: Served, detail: str | None, shown: bool) -> None:
    body = (await served.complete(speculative={"metrics": detail})).json()
    assert (body["metrics"]["speculative_decoding"] is not None) == shown
    assert "num_draft_nodes" not in (body["metrics"]["speculative_decoding"] or {})


@pytest.mark.parametrize("method", METHODS)
async def test_method_is_applied(served: Served, method: str) -> None:
    body = (await served.complete(speculative={"method": method})).json()
    shown = body["metrics"]["speculative"]
    assert shown["method"] == method
    shown.pop("presets", None)
    assert shown == {"method": method, **APPLIED.get(method, shown)}
    assert served.engine.added[0].config.method == method
    drafted = served.metric("mmtad_draft_tokens_total", model="tiny", method=method)
    assert (body["metrics"]["speculative_decoding"] is None) == (method in ("target", "draft", "mtjd"))
    assert (drafted == 0) == (method in ("target", "draft", "mtjd"))
    assert (body["metrics"]["target_logprob_mean"] is None) == (method == "draft")


@pytest.mark.parametrize(
    ("fields", "threshold"),
    [
        ({"temperature": 0}, 0.7),
        ({"temperature": 0.5}, 0.5),
        ({}, 0.5),
        ({"temperature": 0, "speculative": {"acceptance_threshold": 0.2}}, 0.2),
    ],
)
async def test_threshold_follows_the_temperature(
    served: Served, fields: dict[str, Any], threshold: float
) -> None:
    metrics = (await served.complete(**({"temperature": None} | fields))).json()["metrics"]
    assert metrics["speculative"]["acceptance_threshold"] == threshold


async def test_speculative_false_is_target(served: Served) -> None:
    assert (await served.complete(speculative=False)).json()["metrics"]["speculative"] == {"method": "target"}


async def test_unused_speculative_keys_change_nothing(served: Served) -> None:
    options = {"method": "speculative", "num_speculative_tokens": 16, "acceptance_threshold": 0.1}
    body = (await served.complete(speculative=options)).json()
    shown = {"method": "speculative", "num_speculative_tokens": 16, "acceptance": "token", "adaptive": False}
    assert body["metrics"]["speculative"] == shown


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"method": "speculative", "acceptance": "block"}, "acceptance"),
        ({"method": "multi_candidate", "candidates_per_level": [3, 1, 2, 1]}, "candidates_per_level"),
    ],
)
async def test_lossless_keys_are_applied(served: Served, options: dict[str, Any], key: str) -> None:
    metrics = (await served.complete(speculative=options)).json()["metrics"]
    assert metrics["speculative"][key] == options[key]
    config = served.engine.added[0].config
    assert getattr(config, key) in (options[key], tuple(options.get("candidates_per_level", ())))
    speculation = metrics["speculative_decoding"]
    assert speculation["num_spec_tokens"] == 4
    assert speculation["num_draft_tokens"] == 4 * speculation["num_spec_steps"]


async def test_draft_id_is_served_with_draft(served: Served) -> None:
    body = (await served.complete(model="tiny-draft")).json()
    assert body["model"] == "tiny-draft"
    assert served.engine.added[0].config.method == "draft"
    assert served.metric("mmtad_generation_tokens_total", model="tiny-draft", method="draft") == 11


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", [ids_of("hi")]),
        (["hi", "you"], [ids_of("hi"), ids_of("you")]),
        ([72, 105], [[72, 105]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (None, [[BOS]]),
        ("", [[BOS]]),
        (["", "a"], [[BOS], ids_of("a")]),
        ("</s>", [[EOS]]),
    ],
)
async def test_prompt_shapes(served: Served, prompt: Any, expected: list[list[int]]) -> None:
    response = await served.complete(prompt=prompt)
    assert response.status_code == 200
    assert [sequence.prompt_ids for sequence in served.engine.added] == expected
    assert [choice["index"] for choice in response.json()["choices"]] == list(range(len(expected)))
    assert response.json()["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_prompt_may_be_omitted(served: Served) -> None:
    response = await served.client.post("/v1/completions", json={"model": "tiny"})
    assert response.status_code == 200
    assert served.engine.added[0].prompt_ids == [BOS]


async def test_choices_of_several_prompts_are_numbered(served: Served) -> None:
    """n x prompts choices, more than the engine has rows."""
    response = await served.complete(prompt=["a", "b", "c"], n=3, max_tokens=4)
    choices = response.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(9))
    assert {choice["text"] for choice in choices} == {"abcd"}
    assert [sequence.choice for sequence in served.engine.added] == list(range(9))
    assert response.json()["usage"] == usage(3, 36)


async def test_parameters_reach_the_engine(served: Served) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "seed": -(2**63),
        "stop_token_ids": [9],
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "repetition_penalty": 0.5,
        "min_tokens": 2,
    }
    await served.complete(**fields, ignore_eos=True, max_tokens=3, logit_bias={"0": -100, "257": 5.5})
    params = served.engine.added[0].params
    assert {name: getattr(params, name) for name in fields if name != "stop_token_ids"} == {
        name: value for name, value in fields.items() if name != "stop_token_ids"
    }
    assert params.stop_token_ids == (9,)
    assert params.logit_bias == ((0, -100.0), (257, 5.5))
    assert params.ignore_eos
    assert params.max_tokens == 3


async def test_null_means_the_default(served: Served) -> None:
    names = (
        "max_tokens",
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "stop",
        "seed",
        "stream",
        "logprobs",
        "echo",
        "best_of",
        "logit_bias",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "min_tokens",
    )
    response = await served.complete(**dict.fromkeys(names), user=None, speculative=None, suffix=None)
    assert response.status_code == 200
    params = served.engine.added[0].params
    assert not params.adjusts_logits
    assert (params.num_top_log_probs, params.prompt_log_probs) == (0, False)
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (16, 1.0, 0, 1.0)
    assert params.seed == response.json()["metrics"]["seed"] >= 0


async def test_configured_seed_is_used(serve: Serve) -> None:
    async with serve(seed=11) as served:
        assert (await served.complete()).json()["metrics"]["seed"] == 11
        assert served.engine.added[0].params.seed == 11


async def test_max_tokens_zero(served: Served) -> None:
    """Uses an engine of its own rules: the scripted one answers with no token and `length`."""
    body = (await served.complete(max_tokens=0)).json()
    assert body["choices"][0] | {"logprobs": None} == {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    assert body["usage"] == usage(1, 0)
    assert body["metrics"]["target_logprob_mean"] is None
    assert body["metrics"]["tokens_per_second"] is None


async def test_eos_ends_a_choice_and_is_counted(served: Served) -> None:
    body = (await served.complete(max_tokens=16)).json()
    assert body["choices"][0]["text"] == "abcdefghij"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["stop_reason"] is None
    assert body["usage"]["completion_tokens"] == 11


@pytest.mark.parametrize(
    ("fields", "text", "stop_reason", "num_tokens"),
    [
        ({"stop": "c"}, "ab", "c", 3),
        ({"stop": ["cd"]}, "ab", "cd", 4),  # across two steps of three tokens
        ({"stop": ["defg", "ef"]}, "abcd", "ef", 6),  # the first to be complete wins
        ({"stop": ["f", "def"]}, "abc", "def", 6),  # complete together: the longer one
        ({"stop": "cd", "include_stop_str_in_output": True}, "abcd", "cd", 4),
        ({"stop": "jk"}, "abcdefghij", None, 11),  # held back, then released by the end
        ({"stop": []}, "abcdefghij", None, 11),
        ({"stop_token_ids": ids_of("d")}, "abc", ids_of("d")[0], 4),
        ({"stop_token_ids": ids_of("d"), "include_stop_str_in_output": True}, "abcd", ids_of("d")[0], 4),
        ({"stop_token_ids": ids_of("d"), "stop": "cd"}, "abc", ids_of("d")[0], 4),
        ({"stop": "a"}, "", "a", 1),
    ],
)
@pytest.mark.parametrize("tokens_per_step", [1, 3, 16])
async def test_stops(
    serve: Serve, fields: dict[str, Any], text: str, stop_reason: Any, num_tokens: int, tokens_per_step: int
) -> None:
    async with serve(ScriptedEngine(tokens_per_step=tokens_per_step)) as served:
        whole = (await served.complete(**fields)).json()
        stream = events(await served.complete(**fields, stream=True, stream_options={"include_usage": True}))
        expected = {"text": text, "finish_reason": "stop", "stop_reason": stop_reason}
        assert expected.items() <= whole["choices"][0].items()
        assert streamed_choices(stream) == {0: expected}
        assert whole["usage"]["completion_tokens"] == num_tokens
        assert stream[-1]["usage"] == whole["usage"]
        # What was decoded beyond the stop is in no counter.
        delivered = served.metric("mmtad_generation_tokens_total", model="tiny", method="mmtad")
        assert delivered == 2 * num_tokens
        assert served.engine.num_running == 0


@pytest.mark.parametrize("tokens_per_step", [1, 2, 3, 5])
@pytest.mark.parametrize("stop", [None, "€", "ö€", "🎉x", ["ñ", "zz"]])
async def test_stream_equals_whole_for_any_text(serve: Serve, tokens_per_step: int, stop: Any) -> None:
    engine = ScriptedEngine(script=constant("aö€🎉ñ z€"), tokens_per_step=tokens_per_step)
    async with serve(engine) as served:
        for max_tokens in (0, 1, 2, 3, 5, 8, 12, 18, 30):
            fields = {"stop": stop, "max_tokens": max_tokens, "n": 2}
            whole = (await served.complete(**fields)).json()["choices"]
            stream = events(await served.complete(**fields, stream=True))
            keys = ("text", "finish_reason", "stop_reason")
            assert streamed_choices(stream) == {
                choice["index"]: {key: choice[key] for key in keys} for choice in whole
            }
            for chunk in stream[:-2]:
                assert "\ufffd" not in chunk["choices"][0]["text"]


async def test_cut_character_ends_as_replacement(serve: Serve) -> None:
    async with serve(ScriptedEngine(script=constant("a€"))) as served:
        assert (await served.complete(max_tokens=2)).json()["choices"][0]["text"] == "a\ufffd"


async def test_special_tokens_are_skipped_or_shown(serve: Serve) -> None:
    async with serve(ScriptedEngine(script=constant("a</s>b"))) as served:
        hidden = await served.complete(max_tokens=3, ignore_eos=True)
        shown = await served.complete(max_tokens=3, ignore_eos=True, skip_special_tokens=False)
        assert hidden.json()["choices"][0]["text"] == "ab"
        assert shown.json()["choices"][0]["text"] == "a</s>b"


async def test_stream_chunks(served: Served) -> None:
    response = await served.complete(max_tokens=7, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response)
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["abc", "def", "g"]
    assert all("usage" not in chunk for chunk in chunks)


async def test_stream_usage(served: Served) -> None:
    options = {"include_usage": True, "include_obfuscation": True}
    chunks = events(await served.complete(max_tokens=7, stream=True, stream_options=options))
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 3
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == usage(1, 7)
    assert chunks[-1]["metrics"]["speculative_decoding"]["num_spec_steps"] == 3


async def test_usage_says_how_much_of_the_prompts_was_cached(serve: Serve) -> None:
    """Choices of one prompt are counted as it is, once; streamed as whole; metrics count every choice."""
    async with serve(ScriptedEngine(num_reused=2)) as served:
        fields = {"prompt": ["xyz", "uvw"], "n": 2, "max_tokens": 3}
        whole = (await served.complete(**fields)).json()
        assert whole["usage"] == usage(6, 12, cached=4)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = events(await served.complete(**fields, **options))
        assert chunks[-1]["usage"] == whole["usage"]
        assert served.metric("mmtad_prefix_cache_hit_tokens_total", model="tiny") == 2 * 4 * 2
        assert served.metric("mmtad_prefix_cache_query_tokens_total", model="tiny") == 2 * 4 * 3


async def test_stream_continuous_usage(served: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(await served.complete(max_tokens=7, stream=True, stream_options=options))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [3, 6, 7, 7]
    assert ["prompt_tokens_details" in chunk["usage"] for chunk in chunks] == [False, False, False, True]


async def test_delivered_tokens_equal_usage(served: Served) -> None:
    total = 0
    for fields in ({"n": 3}, {"stop": "e"}, {"prompt": ["a", "b"], "max_tokens": 5}, {"max_tokens": 0}):
        total += (await served.complete(**fields)).json()["usage"]["completion_tokens"]
    assert served.metric("mmtad_generation_tokens_total", model="tiny", method="mmtad") == total > 0
    by_position = [
        served.metric(
            "mmtad_accepted_tokens_by_position_total", model="tiny", method="mmtad", position=str(position)
        )
        for position in range(2)
    ]
    accepted = served.metric("mmtad_accepted_tokens_total", model="tiny", method="mmtad")
    assert sum(value or 0 for value in by_position) == accepted
