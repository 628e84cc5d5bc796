"""Whether a sequence can be decoded by a pair at all."""

from decoding.model_pair import ModelPair
from decoding.sequence import Sequence


def check_sequence(sequence: Sequence, pair: ModelPair) -> None:
    """Raises ValueError with a message that names the field."""
    if not sequence.prompt_ids:
        raise ValueError("prompt_ids must hold at least one token")
    if not 0 <= min(sequence.prompt_ids) <= max(sequence.prompt_ids) < pair.vocab_size:
        raise ValueError(f"prompt_ids must lie between 0 and {pair.vocab_size - 1}")
    if not all(0 <= token_id < pair.vocab_size for token_id, _ in sequence.params.logit_bias):
        raise ValueError(f"logit_bias must name token ids between 0 and {pair.vocab_size - 1}")
    if sequence.params.num_top_log_probs > pair.vocab_size:
        raise ValueError(f"num_top_log_probs must be at most {pair.vocab_size}")
    if len(sequence.prompt_ids) + sequence.params.max_tokens > pair.max_model_len:
        raise ValueError(f"max_tokens and the prompt must fit {pair.max_model_len} tokens together")
    if sequence.config.uses_draft and not pair.has_draft:
        raise ValueError(f"method {sequence.config.method!r} needs a draft model and none is loaded")
