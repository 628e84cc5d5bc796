"""Log-probabilities, echo, `best_of` and `min_tokens` of completions, whole and streamed."""

import math
from typing import Any

import pytest

from decoding import Sequence
from server.choice_text import Prefix
from server.text import TextCodec
from tests.server.conftest import Serve, Served
from tests.server.fakes import BOS, EOS, ScriptedEngine, byte_tokenizer, constant, ids_of, save_tokenizer
from tests.server.test_completions import events, usage
from tests.server.test_text import CODEC, word_codec

LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


async def streamed(served: Served, **fields: Any) -> dict[int, dict[str, Any]]:
    """The choices of a stream, put together again."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in events(await served.complete(**fields, stream=True)):
        for choice in chunk["choices"]:
            entry = choices.setdefault(choice["index"], {"text": "", **{name: [] for name in LISTS}})
            entry["text"] += choice["text"]
            for name in LISTS:
                entry[name] += choice["logprobs"][name]
    return choices


async def whole(served: Served, **fields: Any) -> dict[int, dict[str, Any]]:
    response = await served.complete(**fields)
    assert response.status_code == 200, response.text
    return {
        choice["index"]: {"text": choice["text"], **choice["logprobs"]}
        for choice in response.json()["choices"]
    }


async def test_the_object_is_openais(served: Served) -> None:
    (choice,) = (await served.complete(max_tokens=2, logprobs=3)).json()["choices"]
    assert choice["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"a": -0.5, "b": -1.5, "c": -9999.0}, {"b": -0.5, "c": -1.5, "d": -9999.0}],
        "text_offset": [0, 1],
    }


async def test_none_asked_none_given(served: Served) -> None:
    assert (await served.complete(max_tokens=2)).json()["choices"][0]["logprobs"] is None
    chunks = events(await served.complete(max_tokens=2, stream=True))
    assert all(chunk["choices"][0]["logprobs"] is None for chunk in chunks)


async def test_zero_shows_the_taken_token_only(served: Served) -> None:
    shown = (await served.complete(max_tokens=2, logprobs=0)).json()["choices"][0]["logprobs"]
    assert shown["top_logprobs"] == [{"a": -0.5}, {"b": -0.5}]


async def test_every_counted_token_has_an_entry(served: Served) -> None:
    """The end-of-sequence token too: the sum is what `target_logprob_mean` is the mean of."""
    body = (await served.complete(logprobs=1)).json()
    shown = body["choices"][0]["logprobs"]
    assert shown["tokens"] == [*"abcdefghij", "</s>"]
    assert len(shown["tokens"]) == body["usage"]["completion_tokens"]
    assert shown["text_offset"] == list(range(11))


@pytest.mark.parametrize(
    ("method", "origins"),
    [
        ("target", ["target"] * 6),
        ("mtjd", ["target"] * 6),
        ("draft", ["draft"] * 6),
        ("mmtad", ["draft", "draft", "target", "draft", "draft", "target"]),
    ],
)
async def test_detailed_says_who_proposed_each_token(served: Served, method: str, origins: list[str]) -> None:
    fields = {"max_tokens": 6, "logprobs": 1, "prompt": "pq", "echo": True}
    fields["speculative"] = {"method": method, "metrics": "detailed"}
    assert (await whole(served, **fields))[0]["origins"] == ["prompt", "prompt", *origins]
    chunks = events(await served.complete(**fields, stream=True))
    shown = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"]]
    assert [origin for part in shown for origin in part["origins"]] == ["prompt", "prompt", *origins]
    fields["speculative"] = {"method": method}
    assert "origins" not in (await whole(served, **fields))[0]


@pytest.mark.parametrize("tokens_per_step", [1, 2, 3, 5])
@pytest.mark.parametrize("stop", [None, "€", "ö€", "🎉x", ["ñ", "zz"], "€ñ"])
@pytest.mark.parametrize("echo", [False, True])
async def test_streamed_equals_whole(serve: Serve, tokens_per_step: int, stop: Any, echo: bool) -> None:
    engine = ScriptedEngine(script=constant("aö€🎉ñ z€"), tokens_per_step=tokens_per_step)
    async with serve(engine) as served:
        for max_tokens in (0, 1, 2, 5, 8, 12, 30):
            fields = {"stop": stop, "max_tokens": max_tokens, "n": 2, "logprobs": 2, "echo": echo}
            fields["prompt"] = "€uro"
            choices = await whole(served, **fields)
            assert await streamed(served, **fields) == choices
            for choice in choices.values():
                check_offsets(choice["text"], choice["tokens"], choice["text_offset"])


def check_offsets(text: str, tokens: list[str], offsets: list[int]) -> None:
    """Each token begins where its offset says, the parts of a character where the character does."""
    assert offsets == sorted(offsets)
    assert all(0 <= offset <= len(text) for offset in offsets)
    for token, offset in zip(tokens, offsets, strict=True):
        assert (
            text[offset:].startswith(token)
            or token.startswith("bytes:")
            or offset == len(text)
            or (token == "</s>")
        )


async def test_parts_of_a_character(serve: Serve) -> None:
    async with serve(ScriptedEngine(script=constant("a€b"))) as served:
        choice = (await whole(served, max_tokens=5, logprobs=0))[0]
    assert choice["tokens"] == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "b"]
    assert choice["text_offset"] == [0, 1, 1, 1, 2]


async def test_a_stop_string_keeps_the_tokens_that_are_counted(served: Served) -> None:
    body = (await served.complete(stop="cd", logprobs=0)).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("ab", ["a", "b", "c", "d"])
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 2]
    assert body["usage"]["completion_tokens"] == 4


async def test_echo_scores_the_prompt(served: Served) -> None:
    """lm-eval's request: nothing is generated, the prompt's first token has no log-probability."""
    body = (await served.complete(prompt="xyz", echo=True, logprobs=1, max_tokens=0)).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("xyz", "length")
    assert choice["logprobs"] == {
        "tokens": ["x", "y", "z"],
        "token_logprobs": [None, -0.25, -1.25],
        "top_logprobs": [None, {"y": -0.5}, {"z": -0.5}],
        "text_offset": [0, 1, 2],
    }
    assert body["usage"] == usage(3, 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_without_log_probs(served: Served, stream: bool) -> None:
    fields = {"prompt": ["q", "r"], "n": 2, "echo": True, "max_tokens": 2, "logprobs": 0}
    choices = await (streamed if stream else whole)(served, **fields)
    assert [choice["text"] for choice in choices.values()] == ["qab", "qab", "rab", "rab"]
    assert [choice["text_offset"] for choice in choices.values()] == [[0, 1, 2]] * 4
    plain = (await served.complete(**fields | {"logprobs": None})).json()["choices"]
    assert [choice["text"] for choice in plain] == ["qab", "qab", "rab", "rab"]
    assert not served.engine.added[-1].params.prompt_log_probs


@pytest.mark.parametrize(
    "prompt", ["\0\x01 \u202e\u200d", "👩\u200d👩\u200d👧", "עברית", "a</s>b", "€", "\r\n\t", "\ufffd"]
)
async def test_echo_is_byte_exact(served: Served, prompt: str) -> None:
    choice = (await whole(served, prompt=prompt, echo=True, logprobs=0, max_tokens=1))[0]
    assert choice["text"] == prompt + "a"
    check_offsets(choice["text"], choice["tokens"], choice["text_offset"])


@pytest.mark.parametrize(
    ("prompt", "text", "tokens", "offsets"),
    [
        (ids_of("hi"), "hi", ["h", "i"], [0, 1]),
        ([BOS, *ids_of("hi")], "hi", ["<s>", "h", "i"], [0, 0, 1]),
        (None, "", ["<s>"], [0]),
        ("", "", ["<s>"], [0]),
    ],
)
async def test_echo_of_token_ids(
    served: Served, prompt: Any, text: str, tokens: list[str], offsets: list[int]
) -> None:
    choice = (await whole(served, prompt=prompt, echo=True, logprobs=0, max_tokens=1))[0]
    assert choice["text"] == text + "a"
    assert choice["tokens"] == [*tokens, "a"]
    assert choice["text_offset"] == [*offsets, len(text)]


def test_what_the_tokenizer_adds_is_not_echoed() -> None:
    prefix = Prefix.of(
        TextCodec(byte_tokenizer(bos=True)), "hé", [BOS, *ids_of("hé")], skip_special_tokens=True
    )
    assert (prefix.text, prefix.offsets) == ("hé", [0, 0, 1, 1])


def test_echo_in_the_manner_of_sentencepiece() -> None:
    codec = word_codec()
    prefix = Prefix.of(codec, "Hello world", [0, 1], skip_special_tokens=True)
    assert (prefix.text, prefix.offsets) == ("Hello world", [0, 5])
    assert [codec.token_text(token) for token in (0, 1)] == [" Hello", " world"]


def test_token_text() -> None:
    assert [CODEC.token_text(token) for token in (*ids_of("a "), EOS)] == ["a", " ", "</s>"]
    assert CODEC.token_bytes(ids_of("é")[0]) == b"\xc3"
    assert all(CODEC.token_bytes(ids_of(chr(byte))[0]) == bytes([byte]) for byte in range(128))


def ranked(sequence: Sequence) -> list[int]:
    """The later the choice, the longer it goes on: more tokens of -0.5 after a first one of -4."""
    return [*ids_of("abcdefgh"[: 1 + sequence.choice % 4]), EOS]


class RankedEngine(ScriptedEngine):
    """Its last candidate is the likeliest."""

    def _advance(self, sequence: Sequence) -> Any:
        import dataclasses

        output = super()._advance(sequence)
        log_probs = [-4.0 if place == 0 else -0.5 for place in range(len(output.token_ids))]
        return dataclasses.replace(output, log_probs=log_probs)


async def test_best_of_returns_the_likeliest(serve: Serve) -> None:
    async with serve(RankedEngine(script=ranked, tokens_per_step=16)) as served:
        body = (await served.complete(best_of=4, n=2, prompt=["p", "q"], logprobs=0)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == ["abcd", "abc", "abcd", "abc"]
    assert [len(choice["logprobs"]["tokens"]) for choice in body["choices"]] == [5, 4, 5, 4]
    assert body["usage"]["completion_tokens"] == 2 * (2 + 3 + 4 + 5)  # what was decoded was paid for
    assert body["usage"]["prompt_tokens"] == 2


async def test_best_of_equal_to_n_keeps_the_order(serve: Serve) -> None:
    async with serve(RankedEngine(script=ranked)) as served:
        body = (await served.complete(best_of=4, n=4)).json()
    assert [choice["text"] for choice in body["choices"]] == ["a", "ab", "abc", "abcd"]


async def test_best_of_without_a_token(served: Served) -> None:
    body = (await served.complete(best_of=3, max_tokens=0)).json()
    assert [choice["text"] for choice in body["choices"]] == [""]
    assert not math.isinf(body["metrics"]["target_logprob_mean"] or 0)


@pytest.mark.parametrize("tokens_per_step", [1, 3, 16])
@pytest.mark.parametrize(
    ("stop", "min_tokens", "text"),
    [
        ("c", 0, "ab"),
        ("c", 2, "ab"),  # it ends with the third token
        ("c", 3, "abcdefghij"),
        ("cd", 3, "ab"),  # begins early, ends late
        (["c", "cde"], 3, "ab"),
        (["c", "i"], 3, "abcdefgh"),
        ("j", 16, "abcdefghij"),
    ],
)
async def test_stop_strings_wait_for_min_tokens(
    serve: Serve, tokens_per_step: int, stop: Any, min_tokens: int, text: str
) -> None:
    async with serve(ScriptedEngine(tokens_per_step=tokens_per_step)) as served:
        fields = {"stop": stop, "min_tokens": min_tokens, "logprobs": 0}
        choices = await whole(served, **fields)
        assert choices[0]["text"] == text
        assert await streamed(served, **fields) == choices


async def test_a_slow_reader_loses_no_entry(serve: Serve) -> None:
    """Events that are merged while nobody reads keep what they carried."""
    async with serve(ScriptedEngine(tokens_per_step=1)) as served:
        choice = (await whole(served, prompt="xy", echo=True, logprobs=1, n=1))[0]
    assert choice["tokens"] == [*"xy", *"abcdefghij", "</s>"]


def test_tokenizer_file_round_trip(tmp_path: Any) -> None:
    codec = TextCodec.from_file(save_tokenizer(tmp_path))
    assert codec.decode(ids_of("a€"), skip_special_tokens=True) == "a€"
