"""Texts to compare with that no method of the engine writes: beam search over whole texts, and repetition."""

import torch
from transformers import AutoModelForCausalLM

from benchmarks.generation import Generation

REPEATED = 8  # tokens of the text that the repetition row says again and again


@torch.inference_mode()
def beam_search(
    folder: str,
    prompts: list[list[int]],
    *,
    width: int,
    max_tokens: int,
    ends: tuple[int, ...],
    batch: int = 8,
) -> list[Generation]:
    """The likeliest text that `width` beams find, by the stock loop; scores are not divided by length."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    results: list[Generation] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        longest = max(map(len, part))
        inputs = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in part])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in part])
        outputs = model.generate(
            inputs,
            attention_mask=mask,
            num_beams=width,
            do_sample=False,
            length_penalty=0.0,
            max_new_tokens=max_tokens,
            pad_token_id=ends[0] if ends else 0,
            eos_token_id=list(ends),
        )
        results += [_cut(tokens, ends) for tokens in outputs[:, longest:].tolist()]
    return results


def _cut(tokens: list[int], ends: tuple[int, ...]) -> Generation:
    end = next((index for index, token in enumerate(tokens) if token in ends), None)
    kept = tokens if end is None else tokens[: end + 1]
    return Generation(token_ids=kept, num_steps=len(kept), ended=end is not None)


def repetition(texts: list[Generation]) -> list[Generation]:
    """Texts of the same lengths that only repeat the first tokens of `texts`: likely, and worthless."""
    return [
        Generation(
            token_ids=[text.token_ids[place % REPEATED] for place in range(len(text.token_ids))],
            num_steps=len(text.token_ids),
        )
        for text in texts
    ]
