"""What reduced precision changes: both models in every number type, against themselves in float32.

    python -m benchmarks.fidelity --prompts 20 --max-tokens 64

Texts are the workload's prompts and what the float32 target answers, drawn at temperature 1. Per position
of them: the divergence KL(float32 || reduced) of the untransformed distributions in nats, whether both put
the same token first, and the perplexity. Prints a row per model and number type and one JSON object.
"""

import argparse
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.generation import generate, text_logits
from benchmarks.load.processes import commit
from benchmarks.pairs import BenchPair, load_pair
from benchmarks.tasks import make_task
from decoding import DecodingConfig, SamplingParams
from decoding.model import CausalModel

EXACT = "float32"
REDUCED = ("float16", "bfloat16")
Row = dict[str, Any]


def texts(pair: BenchPair, arguments: argparse.Namespace) -> list[list[int]]:
    """Prompts with answers of `pair`'s target, as token ids."""
    prompts = make_task(pair, arguments.workload, arguments.prompts, arguments.seed).prompts
    params = SamplingParams(arguments.max_tokens, temperature=1.0, seed=arguments.seed)
    answers, _ = generate(pair.pair, prompts, params, DecodingConfig("target"), batch=min(8, len(prompts)))
    return [prompt + answer.token_ids for prompt, answer in zip(prompts, answers, strict=True)]


def log_probs(model: CausalModel, text: list[int]) -> Tensor:
    """Of the token behind each position but the last, `[tokens - 1, vocab]`, in float64."""
    return text_logits(model, text[:-1], keep=len(text) - 1).double().log_softmax(-1)


def compare(exact: Tensor, reduced: Tensor, text: list[int]) -> Tensor:
    """Per position `[tokens - 1, 4]`: divergence, same first token, log-probability exact and reduced.

    Tokens without a chance in either, which a cut head gives, do not count.
    """
    terms = exact.exp() * (exact - reduced)
    divergence = terms.where(exact > -math.inf, 0.0).sum(-1)
    same = exact.argmax(-1) == reduced.argmax(-1)
    chosen = torch.tensor(text[1:], device=exact.device)[:, None]
    likelihoods = [each.gather(1, chosen)[:, 0] for each in (exact, reduced)]
    return torch.stack([divergence, same.double(), *likelihoods], dim=1)


def rows(exact: BenchPair, reduced: BenchPair, dtype: str, asked: list[list[int]]) -> Iterator[Row]:
    """One row per model of `reduced`, which holds the weights of `exact` in `dtype`."""
    for role, model in reduced.pair.models.items():
        original = exact.pair.models[role]
        each = torch.cat([compare(log_probs(original, text), log_probs(model, text), text) for text in asked])
        # A cut head cannot say every token of the text.
        said = each[each[:, 2] > -math.inf]
        divergence, same = each[:, :2].mean(0).tolist()
        loss, loss_reduced = (-said[:, 2:].mean(0)).tolist()
        yield {
            "model": role,
            "dtype": dtype,
            "positions": len(each),
            "kl_nats": divergence,
            "same_first_token": same,
            "perplexity": math.exp(loss),
            "perplexity_change": math.exp(loss_reduced - loss) - 1,
        }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    exact = load_pair(arguments.pair, dtype=EXACT)
    asked = texts(exact, arguments)
    found: list[Row] = []
    for dtype in arguments.dtypes:
        reduced = load_pair(arguments.pair, dtype=dtype)
        print(f"{dtype}: {reduced.pair.description}", flush=True)
        for row in rows(exact, reduced, dtype, asked):
            found.append(row)
            print(
                f"{row['model']:>8} {dtype:>9}  KL {row['kl_nats']:.2e} nats  "
                f"same first token {row['same_first_token']:.4f}  perplexity {row['perplexity']:.3f} "
                f"{row['perplexity_change']:+.3%}  ({row['positions']} positions)",
                flush=True,
            )
    return {"commit": commit(), **vars(arguments), "rows": found}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--pair", default="E", choices=("E", "T"))
    parser.add_argument("--dtypes", nargs="+", choices=REDUCED, default=list(REDUCED))
    parser.add_argument("--workload", help="default: SQL for T, chat for E")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(run(parser.parse_args())))


if __name__ == "__main__":
    main()
