"""The vocabulary of pair T: exactly 64 ids, one per character, with padding, begin and end among them."""

import string

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
CHARACTERS = string.ascii_lowercase + string.digits + " ()|:;,.?'\"=<>*+-/%_!&@#$"
VOCABULARY = (PAD, BOS, EOS, *CHARACTERS)
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
MAX_LENGTH = 512


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Characters to ids; capitals are lowered, any other unknown character becomes padding."""
    tokenizer = Tokenizer(
        models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}, unk_token=PAD)
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def encode_prompt(text: str) -> list[int]:
    """Token ids of a prompt or answer without any tokenizer, `BOS` not included."""
    return [_IDS.get(character, PAD_ID) for character in text.lower()]


_IDS = {token: index for index, token in enumerate(VOCABULARY)}
