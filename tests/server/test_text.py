"""Tokenizing, detokenizing in any pieces, and stop strings against a plain reference."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from decoding import FinishReason
from server.choice_text import ChoiceText, TextRules
from server.messages import StepEvent
from server.text import Detokenizer, StopMatch, StopScanner, TextCodec
from tests.server.fakes import BOS, EOS, byte_tokenizer, ids_of

CODEC = TextCodec(byte_tokenizer())
texts = st.text(st.sampled_from("ab€🎉ö\0 x"), max_size=12)
stops = st.lists(st.text(st.sampled_from("ab€🎉"), min_size=1, max_size=4), max_size=4)


def cuts(count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, count), max_size=6).map(sorted)


def pieces(items: list[int], at: list[int]) -> list[list[int]]:
    bounds = [0, *at, len(items)]
    return [items[start:end] for start, end in itertools.pairwise(bounds)]


def word_codec() -> TextCodec:
    """A tokenizer in the manner of SentencePiece, whose first word loses its space when decoded alone."""
    words = ["▁Hello", "▁world", "▁", "a", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return TextCodec(tokenizer)


@given(texts, st.data())
def test_detokenizing_in_pieces_gives_the_text(text: str, data: st.DataObject) -> None:
    ids = ids_of(text)
    detokenizer = Detokenizer(CODEC, [BOS], skip_special_tokens=True)
    parts = [detokenizer.push(piece) for piece in pieces(ids, data.draw(cuts(len(ids))))]
    assert all("\ufffd" not in part for part in parts)
    assert "".join(parts) + detokenizer.flush() == text


@settings(max_examples=200)
@given(st.lists(st.integers(0, 255), max_size=12), st.data())
def test_broken_bytes_do_not_depend_on_the_pieces(ids: list[int], data: st.DataObject) -> None:
    whole = Detokenizer(CODEC, [], skip_special_tokens=True)
    expected = whole.push(ids) + whole.flush()
    detokenizer = Detokenizer(CODEC, [], skip_special_tokens=True)
    parts = [detokenizer.push(piece) for piece in pieces(ids, data.draw(cuts(len(ids))))]
    assert "".join(parts) + detokenizer.flush() == expected == CODEC.tokenizer.decode(ids)


def test_a_word_keeps_its_space_after_the_prompt() -> None:
    codec = word_codec()
    continued = Detokenizer(codec, [0], skip_special_tokens=True)
    assert continued.push([1]) == " world"
    assert Detokenizer(codec, [], skip_special_tokens=True).push([1]) == "world"


def test_a_prompt_that_ends_inside_a_character() -> None:
    """The half in the prompt is no context, so that its bytes are not shown as output."""
    euro = ids_of("€")
    detokenizer = Detokenizer(CODEC, [*ids_of("abcdefgh"), *euro[:1]], skip_special_tokens=True)
    assert detokenizer.push(ids_of("x")) == "x"


@pytest.mark.parametrize(("skip", "expected"), [(True, "ab"), (False, "a</s>b")])
def test_special_tokens(skip: bool, expected: str) -> None:
    detokenizer = Detokenizer(CODEC, ids_of("p"), skip_special_tokens=skip)
    assert (
        detokenizer.push([*ids_of("a"), EOS]) + detokenizer.push(ids_of("b")) + detokenizer.flush()
        == expected
    )


def first_completed(text: str, stop_strings: list[str]) -> tuple[int, int] | None:
    """Start and end of the stop string that is complete first, the longest of those; by brute force."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stop_strings if text[:end].endswith(stop)]
        if starts:
            return min(starts), end
    return None


@settings(max_examples=500)
@given(st.text(st.sampled_from("ab€"), max_size=14), stops, st.booleans(), st.data())
def test_scanner_agrees_with_brute_force(
    text: str, stop_strings: list[str], include: bool, data: st.DataObject
) -> None:
    scanner = StopScanner(stop_strings, include=include)
    shown, match = "", None
    at = data.draw(cuts(len(text)))
    bounds = [0, *at, len(text)]
    for start, end in itertools.pairwise(bounds):
        found = scanner.push(text[start:end])
        if isinstance(found, StopMatch):
            shown, match = shown + found.text, found
            break
        shown += found
        assert not any(stop in shown for stop in stop_strings)
    expected = first_completed(text, stop_strings)
    if expected is None:
        assert match is None
        assert shown + scanner.flush() == text
    else:
        assert match is not None
        assert shown == text[: expected[1] if include else expected[0]]
        assert match.stop == text[expected[0] : expected[1]]


def test_scanner_holds_back_no_more_than_needed() -> None:
    scanner = StopScanner(["abc"], include=False)
    assert scanner.push("xab") == "x"
    assert scanner.push("ab") == "ab"
    assert scanner.push("d") == "abd"
    assert scanner.flush() == ""


@settings(max_examples=300)
@given(texts, stops, st.data())
def test_choice_counts_up_to_the_completing_token(
    text: str, stop_strings: list[str], data: st.DataObject
) -> None:
    ids = ids_of(text)
    choice = ChoiceText(
        Detokenizer(CODEC, [BOS], skip_special_tokens=True),
        StopScanner(stop_strings, include=False),
        TextRules(stop_token_ids=[], include_stop=False),
    )
    shown, last = "", None
    parts = pieces(ids, data.draw(cuts(len(ids))))
    for number, part in enumerate(parts):
        reason = FinishReason.LENGTH if number == len(parts) - 1 else None
        last = choice.push(
            StepEvent(id="a", choice=0, token_ids=part, log_probs=[0.0] * len(part), finish_reason=reason)
        )
        shown += last.text
        if choice.finished:
            break
    assert last is not None
    expected = first_completed(text, stop_strings)
    if expected is None:
        assert (shown, last.num_tokens, last.finish_reason) == (text, len(ids), FinishReason.LENGTH)
    else:
        start, end = expected
        assert shown == text[:start]
        assert last.num_tokens == len(ids_of(text[:end]))
        assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, text[start:end])


async def test_encode_takes_special_tokens_of_the_tokenizer() -> None:
    codec = TextCodec(byte_tokenizer(bos=True))
    assert await codec.encode(["a", "</s>", ""]) == [[BOS, *ids_of("a")], [BOS, EOS], [BOS]]


@given(st.text(max_size=50))
def test_fewest_tokens_is_a_lower_bound(text: str) -> None:
    assert CODEC.fewest_tokens(text) <= len(ids_of(text))


def test_truncation_and_padding_of_the_file_are_off() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    assert TextCodec(tokenizer).tokenizer.encode("abcd").ids == ids_of("abcd")
