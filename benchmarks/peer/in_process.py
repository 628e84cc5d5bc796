"""This engine and transformers in one process: the same weights, the same requests, in turn."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.generation import generate
from benchmarks.load.processes import commit
from benchmarks.pairs import BenchPair, linear_bytes
from benchmarks.peer.interleave import Contestant, Texts
from decoding import DecodingConfig, SamplingParams, default_threshold

TRANSFORMERS = f"transformers {transformers.__version__}"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEPTHS = (2, 4)
PAGE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Peer:
    """transformers' own models of the pair in one type of numbers; nothing ends a text but its length."""

    dtype: str
    target: Any
    draft: Any
    tokens: int

    @classmethod
    def load(cls, folders: tuple[str, str], dtype: str, tokens: int) -> "Peer":
        target, draft = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]) for folder in folders
        )
        for model in (target, draft):
            model.generation_config.eos_token_id = None
        return cls(dtype, target, draft, tokens)

    def generate(self, prompts: Texts, **options: Any) -> Texts:
        """One prompt after another."""
        return [self._padded([prompt], **options)[0] for prompt in prompts]

    def assisted(self, prompts: Texts, depth: int | None) -> Texts:
        """With the draft: `depth` tokens in every round, or as transformers adapts it by itself."""
        config = self.draft.generation_config
        if depth is not None:
            config.num_assistant_tokens, config.num_assistant_tokens_schedule = depth, "constant"
            config.assistant_confidence_threshold = 0.0
        else:
            config.num_assistant_tokens = config.num_assistant_tokens_schedule = None
            config.assistant_confidence_threshold = None
        return self.generate(prompts, assistant_model=self.draft)

    def padded(self, prompts: Texts) -> Texts:
        """All prompts as one batch, padded on the left."""
        return self._padded(prompts)

    def batched(self, prompts: Texts) -> Texts:
        """By `generate_batch`, its manager and cache kept between calls, the cache no larger than needed."""
        longest = max(map(len, prompts)) + self.tokens
        blocks = (longest // PAGE_TOKENS + 2) * len(prompts)
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=self.tokens, do_sample=False, eos_token_id=-1, pad_token_id=self._pad
        )
        settings = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS, num_blocks=blocks, max_batch_tokens=max(256, sum(map(len, prompts)))
        )
        outputs = self.target.generate_batch(
            prompts,
            generation_config=config,
            continuous_batching_config=settings,
            persistent_manager=True,
        )
        return [list(output.generated_tokens) for output in outputs.values()]

    @property
    def _pad(self) -> int:
        return int(self.target.config.pad_token_id or 0)

    def _padded(self, prompts: Texts, **options: Any) -> Texts:
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        output = self.target.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=self.tokens,
            do_sample=False,
            pad_token_id=self._pad,
            **options,
        )
        found: Texts = output[:, width:].tolist()
        return found


def ours(
    pair: BenchPair, config: DecodingConfig, batch: int, tokens: int, name: str, group: str
) -> Contestant:
    params = SamplingParams(tokens, temperature=0.0, ignore_eos=True)

    def run(prompts: Texts) -> Texts:
        results, _ = generate(pair.pair, prompts, params, config, batch)
        return [result.token_ids for result in results]

    dtype = "float16 weights" if pair.step_bytes < 2.5 * pair.parameters[0] else "float32"
    notes = {"bytes_per_step": pair.step_bytes, "batch": batch}
    return Contestant(name, group, True, f"mmtad-server {commit()}", dtype, run, notes)


def one_by_one(pair: BenchPair, peers: list[Peer], tokens: int) -> Iterator[Contestant]:
    """Batch 1: the plain loops, then those with a draft."""
    yield ours(pair, DecodingConfig(method="target"), 1, tokens, "target", "target")
    for peer in peers:
        notes = {"bytes_per_step": linear_bytes(peer.target), "batch": 1}
        yield Contestant("generate", "target", False, TRANSFORMERS, peer.dtype, peer.generate, notes)
    for depth in DEPTHS:
        config = DecodingConfig(method="speculative", num_speculative_tokens=depth)
        yield ours(pair, config, 1, tokens, f"speculative, depth {depth}", "speculative")
    for peer in peers:
        notes = {"bytes_per_step": linear_bytes(peer.target), "batch": 1}
        for given in (None, *DEPTHS):
            yield Contestant(
                f"generate(assistant_model), {'adaptive' if given is None else f'depth {given}'}",
                "speculative",
                False,
                TRANSFORMERS,
                peer.dtype,
                partial(peer.assisted, depth=given),
                notes,
            )
    threshold = default_threshold(greedy=True)
    for depth in DEPTHS:
        config = DecodingConfig(
            method="mmtad", num_speculative_tokens=depth, beam_width=2, acceptance_threshold=threshold
        )
        yield ours(pair, config, 1, tokens, f"mmtad, depth {depth}, width 2", "mmtad")


def in_batches(pair: BenchPair, peers: list[Peer], batch: int, tokens: int) -> Iterator[Contestant]:
    """All prompts at once: this engine's plain loop, `generate_batch`, and `generate` over padded prompts."""
    yield ours(pair, DecodingConfig(method="target"), batch, tokens, "target", "batch")
    for peer in peers:
        notes = {"bytes_per_step": linear_bytes(peer.target), "batch": batch}
        for name, run in (("generate_batch", peer.batched), ("generate, padded", peer.padded)):
            group = "batch" if name == "generate_batch" else "padded"
            yield Contestant(name, group, False, TRANSFORMERS, peer.dtype, run, notes)
