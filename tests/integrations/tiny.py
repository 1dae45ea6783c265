"""A tokenizer of single words; small tensors, and what float64 says of them."""

from __future__ import annotations

import torch

V, D = 37, 16
UIDS = ["b", "a", "b", "a", "b"]


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


def exact(logits, targets):
    """logits [..., V] -> log-probs and entropies, float32."""
    logp = logits.double().log_softmax(-1)
    return logp.gather(-1, targets[..., None])[..., 0].float(), -(logp.exp() * logp).sum(-1).float()


def batch():
    """entropy [5, 6], mask and answer_start [5]: one completion is empty, one has no answer."""
    entropy = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) < torch.tensor([6, 4, 5, 0, 3])[:, None]).long()
    return entropy, mask, torch.tensor([4, 2, -1, 0, 1])
