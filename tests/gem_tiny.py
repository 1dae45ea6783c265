"""A byte-level tokenizer and a two-layer Llama made in a moment, for the tests of gem; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Besides the 256 bytes: merges that put the marker's end and the answer's beginning into one token.
MERGES = [("F", "i"), ("Fi", "n"), (":", "Ġ"), (":Ġ", "4"), ("e", "r"), ("Ġ", "1")]


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte a token, a few merges, <|im_start|>, <|im_end|> (eos) and <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = chat_template
    return fast


def tiny_model(seed: int = 0, vocab_size: int = 272, context: int = 512, scale: float = 0.3) -> LlamaForCausalLM:
    """Two layers, random; `scale` makes its distributions uneven enough for samples and scores to differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, tie_word_embeddings=True, initializer_range=scale,
        bos_token_id=None, eos_token_id=tiny_tokenizer().eos_token_id, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def save_tiny(directory: Path, **arguments) -> Path:
    """The tiny model and its tokenizer as a directory that `from_pretrained` opens."""
    tiny_model(**arguments).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
