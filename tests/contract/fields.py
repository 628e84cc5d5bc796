"""Every field of a request, at its default and at one other value, and what the other one changes.

A cell is one request: a field, a value, one of the seven methods. `needs` are fields without which the
field has nothing to change. An effect is a function of the answer and of the answer without the field.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.e2e.tiny import BOS, EOS

METHODS = ("target", "draft", "speculative", "multi_candidate", "mtjd", "mtad", "mmtad")
MAX_TOKENS = 8
PROMPT = "The quick brown"
ALWAYS_EOS = {"logit_bias": {str(EOS): 100}}
ALWAYS_A = 32  # the id of one letter

Body = dict[str, Any]
Effect = Callable[[Body, Body], bool]


@dataclass(frozen=True)
class Field:
    name: str
    default: Any
    other: Any
    effect: Effect
    needs: Body = field(default_factory=dict)


def texts(body: Body) -> list[str]:
    return [c["text"] if "text" in c else c["message"]["content"] for c in body["choices"]]


def num_tokens(body: Body) -> int:
    count: int = body["usage"]["completion_tokens"]
    return count


def is_valid(body: Body, base: Body) -> bool:
    """Nothing more than that: the effect is one of chance."""
    return len(body["choices"]) == len(base["choices"])


def choices_are_equal(body: Body, base: Body) -> bool:
    return len(texts(body)) == 3 and len(set(texts(body))) == 1


def has(name: str, value: Any) -> Effect:
    """`metrics.speculative` says that the key applies, where the method uses it."""

    def effect(body: Body, base: Body) -> bool:
        return body["metrics"]["speculative"].get(name, value) == value

    return effect


THREE = {"n": 3}

SAMPLING = [
    Field("max_tokens", MAX_TOKENS, 3, lambda body, base: num_tokens(body) == 3, {"ignore_eos": True}),
    Field("temperature", 1.0, 0, choices_are_equal, THREE),
    Field("top_p", 1, 0, choices_are_equal, THREE),
    Field("top_k", 0, 1, choices_are_equal, THREE),
    Field("top_k", -1, 1, choices_are_equal, THREE),
    Field("min_p", 0, 1, choices_are_equal, THREE),
    Field("n", 1, 3, lambda body, base: len(body["choices"]) == 3 and num_tokens(body) >= num_tokens(base)),
    Field("stop_token_ids", None, list(range(128)), lambda body, base: num_tokens(body) <= num_tokens(base)),
    Field("presence_penalty", 0, 2, is_valid),
    Field("frequency_penalty", 0, -2, is_valid),
    Field("repetition_penalty", 1, 2, is_valid),
    Field(
        "logit_bias",
        None,
        {str(ALWAYS_A): 100},
        lambda body, base: len(texts(body)[0]) == MAX_TOKENS and len(set(texts(body)[0])) == 1,
        {"ignore_eos": True},
    ),
    Field("seed", None, 11, lambda body, base: body["metrics"]["seed"] == 11),
    Field("min_tokens", 0, 6, lambda body, base: num_tokens(body) > 6 > num_tokens(base) == 1, ALWAYS_EOS),
    Field(
        "ignore_eos",
        False,
        True,
        lambda body, base: num_tokens(body) == MAX_TOKENS > num_tokens(base) == 1,
        ALWAYS_EOS,
    ),
    Field(
        "skip_special_tokens",
        True,
        False,
        lambda body, base: (texts(body), texts(base)) == (["</s>" * MAX_TOKENS], [""]),
        ALWAYS_EOS | {"ignore_eos": True},
    ),
    Field("user", None, "somebody", lambda body, base: texts(body) == texts(base)),
    Field("stop", None, ["A"], lambda body, base: texts(body) == [""], {"logit_bias": {str(ALWAYS_A): 100}}),
    Field(
        "include_stop_str_in_output",
        False,
        True,
        lambda body, base: (texts(body), texts(base)) == (["A"], [""]),
        {"logit_bias": {str(ALWAYS_A): 100}, "stop": ["A"]},
    ),
]

# Of `speculative`: the default is the server's own, null.
SPECULATIVE = [
    Field(name, None, other, has(name, other))
    for name, other in (
        ("num_speculative_tokens", 2),
        ("beam_width", 3),
        ("acceptance_threshold", 0.25),
        ("acceptance_reference", "target"),
        ("acceptance", "block"),
        ("candidates_per_level", [3, 1]),
    )
]


def is_detailed(body: Body, base: Body) -> bool:
    shown = body["metrics"]["speculative_decoding"]
    return shown is None or len(shown["accepted_tokens_per_step"]) == shown["num_spec_steps"]


SPECULATIVE.append(Field("metrics", "summary", "detailed", is_detailed))


def scores_all(body: Body, base: Body) -> bool:
    shown = body["choices"][0]["logprobs"]
    return len(shown["tokens"]) == num_tokens(body) and all(
        2 <= len(top) <= 3 for top in shown["top_logprobs"]
    )


COMPLETION = [
    Field("prompt", None, [BOS, 5, 6], lambda body, base: body["usage"]["prompt_tokens"] == 3),
    Field("prompt", "", ["a", "bc"], lambda body, base: body["usage"]["prompt_tokens"] == 3),
    Field(
        "best_of",
        None,
        3,
        lambda body, base: num_tokens(body) == 3 * MAX_TOKENS and len(texts(body)) == 1,
        {"ignore_eos": True},
    ),
    Field("logprobs", None, 2, scores_all),
    Field(
        "echo",
        False,
        True,
        lambda body, base: texts(body) == [PROMPT + texts(base)[0]],
    ),
]


def chat_scores_all(body: Body, base: Body) -> bool:
    shown = body["choices"][0]["logprobs"]["content"]
    return len(shown) == num_tokens(body) and all(len(entry["top_logprobs"]) == 2 for entry in shown)


CHAT = [
    Field(
        "max_completion_tokens", MAX_TOKENS, 3, lambda body, base: num_tokens(body) == 3, {"ignore_eos": True}
    ),
    Field("logprobs", False, True, lambda body, base: body["choices"][0]["logprobs"] is not None),
    Field("top_logprobs", 0, 2, chat_scores_all, {"logprobs": True}),
]
