"""Models small enough to enumerate or to run in float64, and the plain loops they are compared with."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from decoding import DecodingConfig, Engine, FinishReason, ModelPair, SamplingParams, Sequence, SequenceOutput
from decoding.batch import Batch
from decoding.model import CausalModel
from decoding.sequence import TokenLogProb, TopLogProbs

CPU = torch.device("cpu")
VOCAB = 24
METHODS = ("target", "draft", "speculative", "multi_candidate", "mtjd", "mtad", "mmtad")
LOSSLESS: dict[str, dict[str, Any]] = {
    "speculative": {"method": "speculative"},
    "block": {"method": "speculative", "acceptance": "block"},
    "multi_candidate": {"method": "multi_candidate", "candidates_per_level": (2, 2)},
    "multi_candidate iid": {
        "method": "multi_candidate",
        "candidates_per_level": (2, 2),
        "replacement": True,
    },
}
Script = Callable[[Tensor, Tensor], Tensor]  # token ids and positions [rows, tokens] to logits [..., vocab]


def tiny_llama(seed: int = 0, vocab_size: int = VOCAB, **changes: Any) -> PreTrainedModel:
    """Two layers, grouped heads, rotary positions, float64 throughout: stock norms pass through float32."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
    config = LlamaConfig(vocab_size=vocab_size, **{**settings, **changes})
    model = LlamaForCausalLM(config)
    for part in list(model.modules()):
        for name, child in part.named_children():
            if name.endswith("norm"):
                setattr(part, name, nn.RMSNorm(child.weight.shape[0], eps=config.rms_norm_eps))
    return model.double().eval()


def tiny_gpt2(seed: int = 0, vocab_size: int = VOCAB) -> PreTrainedModel:
    """One layer, learned positions, float64."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=256, n_embd=32, n_layer=1, n_head=2, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).double().eval()


def perturbed(module: PreTrainedModel, noise: float, seed: int = 0) -> PreTrainedModel:
    """A copy whose weights differ by `noise` of their spread: a draft that often agrees."""
    copied = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in copied.parameters():
            spread = weight.std(correction=0)
            weight += noise * spread * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return copied


class Scripted(nn.Module):
    """A stand-in for a transformers model whose logits are a function of each token and its position."""

    dtype = torch.float64

    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script = script
        self.config = LlamaConfig(
            vocab_size=8, hidden_size=2, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
        )

    def set_attn_implementation(self, name: str) -> None:
        pass

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, logits_to_keep: int, cache: Any, **_: Any
    ) -> SimpleNamespace:
        states = torch.zeros(*input_ids.shape, 2, dtype=self.dtype)[:, None]
        cache.update(states, states, 0)
        return SimpleNamespace(logits=self.script(input_ids, position_ids)[:, -logits_to_keep:])


def markov(probs: Tensor) -> Scripted:
    """Logits that depend on the last token only: `probs` `[vocab, vocab]`, zeros allowed."""
    table = probs.double().log()
    return Scripted(lambda token_ids, positions: table[token_ids])


def always(token: int, vocab_size: int = 6, share: float = 0.999) -> Scripted:
    """The same law everywhere: `token` has `share`, the others the rest."""
    probs = torch.full((vocab_size, vocab_size), (1 - share) / (vocab_size - 1))
    probs[:, token] = share
    return markov(probs)


def random_markov(vocab_size: int, seed: int, zeros: int = 0) -> Tensor:
    """Transition probabilities `[vocab, vocab]` with `zeros` impossible tokens in every row."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(vocab_size, vocab_size, generator=generator, dtype=torch.float64) ** 2 + 0.01
    if zeros:
        excluded = torch.rand(vocab_size, vocab_size, generator=generator).topk(zeros, dim=1).indices
        probs.scatter_(1, excluded, 0.0)
    return probs / probs.sum(1, keepdim=True)


def causal(
    module: Any,
    *,
    rows: int = 10,
    max_model_len: int = 96,
    vocab_size: int = VOCAB,
    device: torch.device = CPU,
) -> CausalModel:
    return CausalModel(module, rows=rows, max_model_len=max_model_len, vocab_size=vocab_size, device=device)


def make_pair(
    target: Any,
    draft: Any = None,
    *,
    vocab_size: int = VOCAB,
    rows: int = 10,
    max_model_len: int = 96,
    eos: tuple[int, ...] = (),
    device: torch.device = CPU,
) -> ModelPair:
    settings: dict[str, Any] = {
        "rows": rows,
        "max_model_len": max_model_len,
        "vocab_size": vocab_size,
        "device": device,
    }
    return ModelPair(
        target=causal(target, **settings),
        draft=None if draft is None else causal(draft, **settings),
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=eos,
        bos_token_id=None,
        tokenizer_file=Path("tokenizer.json"),
        description="tiny",
    )


def scripted_pair(target: Tensor, draft: Tensor, eos: tuple[int, ...] = (), rows: int = 10) -> ModelPair:
    """A pair of Markov chains `[vocab, vocab]`."""
    return make_pair(markov(target), markov(draft), vocab_size=len(target), eos=eos, rows=rows)


def llama_pair(noise: float = 0.2, **settings: Any) -> ModelPair:
    """Two float64 Llamas that agree often but not always."""
    target = tiny_llama()
    return make_pair(target, perturbed(target, noise), **settings)


CONFIG_FIELDS = {
    "num_speculative_tokens",
    "beam_width",
    "acceptance_threshold",
    "acceptance_reference",
    "acceptance",
    "candidates_per_level",
    "replacement",
    "adaptive",
}


def request(
    id: str,
    prompt: list[int],
    method: Any = "mmtad",
    *,
    choice: int = 0,
    cache_salt: str = "",
    **fields: Any,
) -> Sequence:
    """A sequence; `fields` are those of `DecodingConfig` and of `SamplingParams` together."""
    config = {name: fields.pop(name) for name in list(fields) if name in CONFIG_FIELDS}
    decoding = DecodingConfig(method=method, **config)
    return Sequence(id, prompt, SamplingParams(**fields), decoding, choice=choice, cache_salt=cache_salt)


def batch_of(sequences: list[Sequence], vocab_size: int = VOCAB, eos: tuple[int, ...] = ()) -> Batch:
    return Batch.of(sequences, slice(0, len(sequences)), eos, vocab_size, CPU)


@dataclass
class Text:
    """All that an engine delivered for one sequence."""

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    steps: list[SequenceOutput] = field(default_factory=list)
    tops: list[TopLogProbs] = field(default_factory=list)
    prompt_log_probs: list[TokenLogProb] | None = None
    finish_reason: FinishReason | None = None

    def take(self, output: SequenceOutput) -> None:
        assert self.finish_reason is None, "delivered after its end"
        assert len(output.token_ids) == len(output.log_probs)
        self.token_ids += output.token_ids
        self.log_probs += output.log_probs
        self.tops += output.top_log_probs or []
        if output.prompt_log_probs is not None:
            assert not self.steps, "the prompt's log-probs come first"
            self.prompt_log_probs = output.prompt_log_probs
        self.steps.append(output)
        self.finish_reason = output.finish_reason


def drain(engine: Engine, texts: dict[str, Text] | None = None, *, check: bool = False) -> dict[str, Text]:
    """Step until nothing is left; the texts by sequence id."""
    texts = {} if texts is None else texts
    for _ in range(5000):
        if not engine.has_work():
            return texts
        for output in engine.step():
            texts.setdefault(output.id, Text()).take(output)
        if check:
            engine.check_integrity()
    raise AssertionError("the engine did not finish")


def generate(pair: ModelPair, *sequences: Sequence, **settings: Any) -> dict[str, Text]:
    """Everything `sequences` deliver when they are decoded together by a new engine."""
    rows = min(model.cache.rows for model in pair.models.values())
    engine = Engine(pair, **{"max_num_seqs": rows - 1, **settings})
    for sequence in sequences:
        engine.add(sequence)
    return drain(engine)


def plain(model: CausalModel, token_ids: list[int]) -> Tensor:
    """Log-probabilities `[tokens, vocab]` after each token, by a stock forward without a cache."""
    reference = stock(model)
    with torch.inference_mode():
        logits = reference(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits[:, : model.vocab_size].log_softmax(-1)


_STOCK: dict[int, tuple[CausalModel, PreTrainedModel]] = {}


def stock(model: CausalModel) -> PreTrainedModel:
    """A copy of the model's module as transformers would run it (in float64 throughout)."""
    if id(model) not in _STOCK:
        reference = copy.deepcopy(model.module)
        reference.set_attn_implementation("sdpa")
        _STOCK[id(model)] = (model, reference)
    return _STOCK[id(model)][1]


def chi_square_tail(statistic: float, degrees: int) -> float:
    """P(chi-square with `degrees` >= `statistic`), by Wilson and Hilferty's normal approximation."""
    spread = 2 / (9 * degrees)
    z = ((statistic / degrees) ** (1 / 3) - 1 + spread) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2))


def chi_square(counts: dict[Any, int], probs: dict[Any, float]) -> float:
    """The p-value of `counts` under `probs`; cells of expectation under 5 are merged into one."""
    total = sum(counts.values())
    assert abs(sum(probs.values()) - 1) < 1e-9
    assert all(probs.get(cell, 0) > 0 for cell in counts), "an impossible outcome happened"
    cells, rest = [], [0.0, 0.0]
    for cell, prob in probs.items():
        pair = [counts.get(cell, 0), prob * total]
        if pair[1] < 5:
            rest = [rest[0] + pair[0], rest[1] + pair[1]]
        else:
            cells.append(pair)
    cells += [rest] if rest[1] >= 5 else []
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    return chi_square_tail(statistic, len(cells) - 1)
