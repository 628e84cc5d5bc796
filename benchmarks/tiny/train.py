"""Train pair T from scratch and write it as two checkpoint folders.

    scripts/train-tiny-pair                 # about ten minutes on two cores

The target learns the task's answers as their imperfect author writes them; the draft learns the target's
own laws on such answers: cross-entropy to them, mixed with the expected acceptance, the sum of min(p, q).
"""

import argparse
import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.tiny.card import write_cards
from benchmarks.tiny.task import make_example, write_answer
from benchmarks.tiny.tokenizer import (
    BOS_ID,
    EOS_ID,
    MAX_LENGTH,
    PAD_ID,
    VOCABULARY,
    encode_prompt,
    make_tokenizer,
)

BATCH = 64  # sequences per step
POOL = 8  # batches that are sorted by length together, so that little padding is computed
PROMPT_WEIGHT = 0.1  # of a prompt's tokens in the loss; an answer's count 1
REPORT_EVERY = 50  # steps


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of a model; its heads are 32 wide."""

    layers: int
    width: int

    def build(self, seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=self.width,
            intermediate_size=self.width * 11 // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 32,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            initializer_range=0.04,
            pad_token_id=PAD_ID,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
        )
        model = LlamaForCausalLM(config)
        model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID
        )
        return model


def batches(seed: int, noise: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless token ids `[BATCH, tokens]` and weights `[BATCH, tokens - 1]` of what follows each token."""
    rng = random.Random(seed)
    while True:
        pool = sorted((_sequence(rng, noise) for _ in range(BATCH * POOL)), key=lambda each: len(each[0]))
        parts = [pool[start : start + BATCH] for start in range(0, len(pool), BATCH)]
        rng.shuffle(parts)
        yield from map(_padded, parts)


def _sequence(rng: random.Random, noise: float) -> tuple[list[int], int]:
    """Token ids of one prompt with its answer, and the length of the prompt."""
    example = make_example(rng)
    prompt = [BOS_ID, *encode_prompt(example.prompt)]
    return [*prompt, *encode_prompt(write_answer(example, rng, noise)), EOS_ID], len(prompt)


def _padded(sequences: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    longest = max(len(ids) for ids, _ in sequences)
    token_ids = torch.full((len(sequences), longest), PAD_ID)
    weights = torch.zeros(len(sequences), longest)
    for row, (ids, prompt_length) in enumerate(sequences):
        token_ids[row, : len(ids)] = torch.tensor(ids)
        weights[row, :prompt_length] = PROMPT_WEIGHT
        weights[row, prompt_length : len(ids)] = 1.0
    return token_ids, weights[:, 1:]


class Optimizers:
    """Muon for the layers' matrices, AdamW for the rest; warm-up, then linear decay to nothing."""

    def __init__(self, model: LlamaForCausalLM, steps: int, rate: float) -> None:
        named = dict(model.named_parameters())
        matrices = [value for name, value in named.items() if "layers" in name and value.ndim == 2]
        others = [value for name, value in named.items() if "layers" not in name or value.ndim != 2]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self._parameters = list(named.values())
        self._rate, self._steps, self._done = rate, steps, 0

    def step(self) -> None:
        self._done += 1
        share = min(self._done / 40, (self._steps - self._done) / (0.6 * self._steps), 1.0)
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = self._rate * share
            part.step()
            part.zero_grad()


Loss = Callable[[Tensor, Tensor, float], tuple[Tensor, float]]


def fit(
    model: LlamaForCausalLM, loss_of: Loss, *, steps: int, rate: float, noise: float, seed: int, name: str
) -> None:
    """`steps` steps on fresh batches; `loss_of` maps ids, weights and the share done to loss and figure."""
    optimizers = Optimizers(model, steps, rate)
    model.train(True)
    started = time.monotonic()
    for step, (token_ids, weights) in enumerate(itertools.islice(batches(seed, noise), steps), start=1):
        loss, figure = loss_of(token_ids, weights, step / steps)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizers.step()
        if step % REPORT_EVERY == 0 or step == steps:
            seconds = time.monotonic() - started
            print(
                f"{name} {step}/{steps}: loss {loss.item():.4f}, {figure:.4f}, "
                f"{seconds:.0f} s, {seconds / step * (steps - step):.0f} s left",
                flush=True,
            )
    model.train(False)


def target_loss(model: LlamaForCausalLM) -> Loss:
    """Weighted cross-entropy; the figure is that of the answers alone, nats per token."""

    def loss_of(token_ids: Tensor, weights: Tensor, done: float) -> tuple[Tensor, float]:
        logits = model(input_ids=token_ids[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten(), reduction="none")
        losses = losses.view_as(weights)
        answers = weights == 1
        return (losses * weights).sum() / weights.sum(), float(losses[answers].mean().detach())

    return loss_of


def draft_loss(draft: LlamaForCausalLM, target: LlamaForCausalLM) -> Loss:
    """Distance to the target's laws on answers; the figure is the mean sum of min(p, q)."""

    def loss_of(token_ids: Tensor, weights: Tensor, done: float) -> tuple[Tensor, float]:
        answers = weights == 1
        with torch.no_grad():
            hidden = target.model(input_ids=token_ids[:, :-1], use_cache=False).last_hidden_state
            p = target.lm_head(hidden[answers]).softmax(-1)
        states = draft.model(input_ids=token_ids[:, :-1], use_cache=False).last_hidden_state
        log_q = draft.lm_head(states[answers]).log_softmax(-1)
        overlap = torch.minimum(p, log_q.exp()).sum(-1).mean()
        cross_entropy = -(p * log_q).sum(-1).mean()
        return cross_entropy - 2 * done * overlap, float(overlap.detach())

    return loss_of


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """An ordinary checkpoint folder: float16 safetensors, configuration, tokenizer."""
    torch.nn.Module.to(model, torch.float16)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner only
    torch.nn.Module.to(model, torch.float32)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/train-tiny-pair", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("models"), help="where the two folders are written")
    parser.add_argument("--keep-target", action="store_true", help="train the draft alone for what is there")
    parser.add_argument("--target-steps", type=int, default=900)
    parser.add_argument("--draft-steps", type=int, default=220)
    parser.add_argument("--target-layers", type=int, default=5)
    parser.add_argument("--target-width", type=int, default=128)
    parser.add_argument("--draft-width", type=int, default=64)
    parser.add_argument("--noise", type=float, default=0.18, help="chance of a mistake per part of an answer")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    seed, noise = arguments.seed, arguments.noise
    shared = {"noise": noise, "rate": arguments.rate}
    started = time.monotonic()
    folders = arguments.out / "tiny-sql", arguments.out / "tiny-sql-draft"
    if arguments.keep_target:
        target = LlamaForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    else:
        target = Shape(arguments.target_layers, arguments.target_width).build(seed)
        fit(target, target_loss(target), steps=arguments.target_steps, seed=seed + 1, name="target", **shared)
        save(target, folders[0])
    draft = Shape(1, arguments.draft_width).build(seed + 2)
    fit(draft, draft_loss(draft, target), steps=arguments.draft_steps, seed=seed + 3, name="draft", **shared)
    save(draft, folders[1])
    write_cards(folders, vars(arguments), time.monotonic() - started)


if __name__ == "__main__":
    main()
