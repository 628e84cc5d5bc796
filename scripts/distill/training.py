"""The training loop: a schedule over time, checkpoints that a later run goes on from."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from scripts.distill.draft import Draft
from scripts.distill.loss import FREQUENT_TOKENS, distillation_loss, draft_log_probs, draw_candidates
from scripts.distill.progress import Progress
from scripts.distill.text import Text

BATCH = 8
LEARNING_RATE = 1.5e-3
LAST_RATE = 0.02  # share of the rate that is left at the end
WARM_UP_STEPS = 50
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
LARGEST_NORM = 1.0
ACCEPTANCE_FROM, ACCEPTANCE_FULL = 0.35, 0.75  # of the time: where the acceptance term starts and is whole
ACCEPTANCE_WEIGHT = 0.6
CHECKPOINT_SECONDS = 60.0
SEED_STRIDE = 1_000_003

_MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(step: int, done: float) -> float:
    """Warm-up over steps, then a cosine over the share of time that is `done`."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (LAST_RATE + (1 - LAST_RATE) * cosine)


def acceptance_weight(done: float) -> float:
    """Share of the acceptance term in the loss."""
    ramp = (done - ACCEPTANCE_FROM) / (ACCEPTANCE_FULL - ACCEPTANCE_FROM)
    return ACCEPTANCE_WEIGHT * min(1.0, max(0.0, ramp))


@dataclass(slots=True)
class Trainer:
    """A draft in training; `step` and `seconds` count what was done in earlier runs, too."""

    draft: Draft
    text: Text
    seed: int
    checkpoint: Path
    optimizer: torch.optim.AdamW
    frequent: Tensor
    step: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, draft: Draft, text: Text, seed: int, checkpoint: Path) -> "Trainer":
        """Begins anew, or goes on from `checkpoint` if it exists."""
        counts = torch.bincount(text.top_ids.reshape(-1).long(), minlength=draft.vocab_size)
        trainer = cls(
            draft=draft,
            text=text,
            seed=seed,
            checkpoint=checkpoint,
            optimizer=_optimizer(draft),
            frequent=counts.argsort(descending=True, stable=True)[:FREQUENT_TOKENS].to(draft.device),
        )
        if checkpoint.is_file():
            trainer._load()
        return trainer

    @property
    def tokens(self) -> int:
        """Positions trained on so far."""
        return self.step * self._batch_size * self.text.token_ids.shape[1]

    @property
    def _batch_size(self) -> int:
        return min(BATCH, len(self.text))

    def run(self, budget: float, progress: Progress) -> None:
        """Train until `budget` seconds have been spent in all; a stopped run loses nothing."""
        before, tokens_before, started = self.seconds, self.tokens, time.monotonic()
        saved = started
        try:
            while self.seconds < budget:
                acceptance = self._advance(self.seconds / budget)
                now = time.monotonic()
                self.seconds = before + now - started
                progress.show(
                    "training",
                    tokens=self.tokens - tokens_before,
                    seconds=now - started,
                    left=budget - self.seconds,
                    note=f", acceptance {acceptance:.3f} in this batch",
                )
                if now - saved > CHECKPOINT_SECONDS:
                    self._save()
                    saved = now
        finally:
            self._save()

    def _advance(self, done: float) -> float:
        """One step; returns the acceptance in its batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, done)
        batch = self.text.select(self._batch()).to(self.draft.device)
        stored = batch.top_ids.shape[2]
        top_ids = batch.top_ids.view(-1, stored)
        generator = torch.Generator().manual_seed(self.seed * SEED_STRIDE + self.step)
        candidates = draw_candidates(top_ids, self.frequent, self.draft.vocab_size, generator)
        hidden = self.draft.hidden(batch.token_ids).flatten(0, 1)
        log_q = draft_log_probs(hidden, self.draft.head, top_ids, candidates)
        log_p = batch.top_log_probs.view(-1, stored)
        loss, acceptance = distillation_loss(log_q, log_p, acceptance_weight(done))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(self.draft.trained().values(), LARGEST_NORM)
        self.optimizer.step()
        self.step += 1
        return float(acceptance)

    def _batch(self) -> Tensor:
        """Sequences of this step: each pass over the text has its own order, a rest is left out."""
        steps_per_pass = len(self.text) // self._batch_size
        passed, place = divmod(self.step, steps_per_pass)
        generator = torch.Generator().manual_seed(self.seed * SEED_STRIDE + passed)
        order = torch.randperm(len(self.text), generator=generator)
        return order[place * self._batch_size :][: self._batch_size]

    def _save(self) -> None:
        tensors = {}
        for name, weight in self.draft.trained().items():
            tensors[f"weight {name}"] = weight.detach()
            for moment in _MOMENTS:
                if weight in self.optimizer.state:
                    tensors[f"{moment} {name}"] = self.optimizer.state[weight][moment]
        partial = self.checkpoint.with_suffix(".partial")
        save_file(tensors, partial, metadata={"step": str(self.step), "seconds": str(self.seconds)})
        partial.replace(self.checkpoint)

    @torch.no_grad()
    def _load(self) -> None:
        with safe_open(self.checkpoint, framework="pt", device=str(self.draft.device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.step, self.seconds = int(file.metadata()["step"]), float(file.metadata()["seconds"])
        for name, weight in self.draft.trained().items():
            weight.copy_(tensors[f"weight {name}"])
            if f"{_MOMENTS[0]} {name}" in tensors:
                moments = {moment: tensors[f"{moment} {name}"] for moment in _MOMENTS}
                self.optimizer.state[weight] = {"step": torch.tensor(float(self.step)), **moments}


def _optimizer(draft: Draft) -> torch.optim.AdamW:
    """AdamW; vectors, such as the weights of norms, do not decay."""
    weights = draft.trained().values()
    groups = [
        {"params": [weight for weight in weights if weight.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS)
