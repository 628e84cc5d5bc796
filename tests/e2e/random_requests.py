"""Requests of every kind for the tiny pair: all methods, fields in random company."""

import random
from typing import Any

from tests.e2e.tiny import byte_tokenizer

METHODS = ("target", "draft", "speculative", "multi_candidate", "mtjd", "mtad", "mmtad")
EMOJI = "\U0001f600\U0001f680"
HEBREW = "שלום"
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"


def ids_of(text: str) -> list[int]:
    ids: list[int] = byte_tokenizer().encode(text).ids
    return ids


PROMPTS: list[Any] = [
    "The quick brown",
    f"{FAMILY} and {EMOJI}",
    f"{HEBREW} \u202eמימין לשמאל\u202c",
    "nul\0in\0the\0middle",
    "",
    ids_of(EMOJI)[:-1],
    [ids_of(HEBREW), ids_of("second")],
    ["one prompt", f"{HEBREW}{EMOJI}"],
]
NUDGED = sorted({*ids_of(EMOJI), *ids_of(HEBREW), *ids_of("\0ab")})


def draw(rng: random.Random, number: int) -> dict[str, Any]:
    """One request; null means that a field was not drawn."""
    max_tokens = rng.choice([0, 1, 2, 7, 16, 24, 32])
    optional: dict[str, Any] = {
        "echo": True,
        "logprobs": rng.choice([0, 1, 5]),
        "n": rng.choice([2, 3]),
        "logit_bias": {str(token_id): rng.choice([4, 6, 8]) for token_id in NUDGED},
        "stop": rng.choice([["\0"], [EMOJI[0], HEBREW[:2], "b\0"], "ab", ["\ufffd\ufffd"]]),
        "include_stop_str_in_output": True,
        "stop_token_ids": rng.sample(range(256), 4),
        "min_tokens": min(max_tokens, 5),
        "ignore_eos": True,
        "skip_special_tokens": False,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.1,
        "top_p": 0.9,
    }
    chance = {"logit_bias": 0.7, "logprobs": 0.7}
    return {
        "model": "tiny",
        "prompt": rng.choice(PROMPTS),
        "max_tokens": max_tokens,
        "temperature": rng.choice([0, 0.7, 1, 1.5]),
        "seed": number,
        "speculative": {"method": METHODS[number % len(METHODS)]},
        **{name: value for name, value in optional.items() if rng.random() < chance.get(name, 0.25)},
    }
