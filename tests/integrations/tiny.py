"""A tokenizer of single words."""

from __future__ import annotations


def tiny_tokenizer(vocab_size: int):
    """`w1 w2` and so on; a tokenizer of transformers with pad, begin and end."""
    import tokenizers
    import transformers

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(vocab_size - 3))])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
