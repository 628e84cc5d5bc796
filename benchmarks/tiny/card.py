"""The cards of pair T: what the two models are, how they were made, what they reach on held-out prompts."""

import random
from pathlib import Path
from typing import Any

import torch

from benchmarks.generation import Generation, generate
from benchmarks.tiny.database import is_correct
from benchmarks.tiny.task import Example, make_example
from benchmarks.tiny.tokenizer import BOS_ID, encode_prompt, make_tokenizer
from decoding import DecodingConfig, ModelPair, SamplingParams, load_model_pair

HELD_OUT_SEED = 1_000_003
MAX_ANSWER = 96  # tokens
NUM_PROMPTS = 400

HEADER = """---
license: apache-2.0
---

# {title}

{about}

Made by `scripts/train-tiny-pair` from nothing but the generator in `benchmarks/tiny/task.py`; no outside
text or weights. It exists to measure decoding methods quickly and is of no other use.

## Task

A line with a table's columns and a question, then the SQL query that answers it, executed on SQLite:

    {prompt}{answer}

The answers trained on come from an imperfect author: each part of a query (function, column, value,
comparison, number) is wrong with chance {noise}, and right queries are written in several ways. So the
models are unsure on purpose: who takes the likeliest answer is mostly right, who samples errs about as
often as the author. The chance was chosen so that sampling is right in about half of the answers.

## Held-out figures

{prompts} prompts from a seed of their own; a right answer returns the reference's rows.

| Decoding of the target | Right answers |
|---|---|
{rows}

The draft's single proposals are accepted with chance {acceptance:.3f} at temperature 1 (speculative decoding
of depth 1), an estimate of the mean sum of min(p, q).

## Recipe

Llama architecture, 64 characters as vocabulary (`<pad>`, `<s>`, `</s>` and 61 more), tied embedding, float16
file. Muon for matrices, AdamW for the rest, rate {rate}, batches of 64 lines, {target_steps} steps for the
target on the author's answers and {draft_steps} for the draft on the target's laws; seed {seed};
{minutes:.0f} minutes in all on {threads} cores, shared with other work.
"""


def held_out(count: int, seed: int = HELD_OUT_SEED) -> list[Example]:
    """Examples that training did not draw."""
    rng = random.Random(seed)
    return [make_example(rng) for _ in range(count)]


def prompt_ids(example: Example) -> list[int]:
    return [BOS_ID, *encode_prompt(example.prompt)]


def grade(examples: list[Example], results: list[Generation]) -> list[bool]:
    """Whether each answer, cut at its end, is right."""
    tokenizer = make_tokenizer()
    texts = [str(tokenizer.decode(result.token_ids, skip_special_tokens=True)) for result in results]
    return [is_correct(example, text) for example, text in zip(examples, texts, strict=True)]


def evaluate(pair: ModelPair, examples: list[Example]) -> tuple[dict[str, float], float]:
    """Share of right answers per way of decoding, and the acceptance of single proposals."""
    prompts = [prompt_ids(example) for example in examples]
    ways = {
        "greedy": SamplingParams(MAX_ANSWER, temperature=0.0),
        "temperature 1, top-k 10, top-p 0.9": SamplingParams(MAX_ANSWER, top_k=10, top_p=0.9),
        "temperature 1": SamplingParams(MAX_ANSWER),
    }
    shares = {}
    for way, params in ways.items():
        results, _ = generate(pair, prompts, params, DecodingConfig(method="target"), 16)
        shares[way] = sum(grade(examples, results)) / len(examples)
        print(f"{way}: {shares[way]:.3f} right", flush=True)
    one = DecodingConfig(method="speculative", num_speculative_tokens=1)
    results, _ = generate(pair, prompts, ways["temperature 1"], one, 16)
    drafted = sum(sum(result.drafted) for result in results)
    acceptance = sum(sum(result.accepted) for result in results) / drafted
    print(f"acceptance at temperature 1: {acceptance:.3f}", flush=True)
    return shares, acceptance


def write_cards(folders: tuple[Path, Path], arguments: dict[str, Any], seconds: float) -> None:
    """Measure the pair that lies in `folders` and write each folder's README.md."""
    pair = load_model_pair(str(folders[0]), str(folders[1]), dtype="float32", max_num_seqs=16)
    examples = held_out(NUM_PROMPTS)
    shares, acceptance = evaluate(pair, examples)
    names = ("Target of pair T (tiny SQL)", "Draft of pair T (tiny SQL)")
    abouts = (
        f"A character-level model of {_size(pair, 'target')} parameters to measure decoding methods with.",
        f"A one-layer model of {_size(pair, 'draft')} parameters that proposes tokens for `tiny-sql`.",
    )
    for folder, title, about in zip(folders, names, abouts, strict=True):
        text = HEADER.format(
            title=title,
            about=about,
            prompt=examples[0].prompt,
            answer=examples[0].reference,
            prompts=len(examples),
            rows="\n".join(f"| {way} | {share:.1%} |" for way, share in shares.items()),
            acceptance=acceptance,
            minutes=seconds / 60,
            threads=torch.get_num_threads(),
            **{key: arguments[key] for key in ("noise", "rate", "target_steps", "draft_steps", "seed")},
        )
        (folder / "README.md").write_text(text, encoding="utf-8")


def _size(pair: ModelPair, role: str) -> str:
    return f"{sum(weight.numel() for weight in pair.models[role].module.parameters()):,}"
