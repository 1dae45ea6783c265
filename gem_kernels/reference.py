"""Eager torch, any float dtype, differentiable: the specification that every kernel is tested against.

It is written to be read, not to be fast: it holds tensors of the size of the logits and sorts whole sequences.
Accumulation is in the dtype of its inputs, so calling it on float64 inputs gives the truth.
Formulas: GEM (arXiv 2511.13007) Eq. 1 and 2; docs/math.md derives the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import top_fraction
from .types import FEATURES, FLOOR, CompletionFeatures, EntropyScores, LinearScore, SegaOutput, TokenStats


def masked(logits: Tensor) -> Tensor:
    """A logit at or below FLOOR is -inf, whatever number masks a word. Its gradient passes."""
    return torch.where(logits <= FLOOR, logits - torch.inf, logits)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """z <- c tanh(z / c). An infinite logit stays infinite: a masked word stays masked."""
    if softcap is None:
        return logits
    return torch.where(torch.isinf(logits), logits, softcap * torch.tanh(logits / softcap))


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    extra: Sequence[str] = (),
) -> TokenStats:
    """logits [..., V], targets [...] -> logprobs [...], entropy [...] in the dtype of `logits`, and `extra_stats`.

    With d = z - max z and s = sum e^d:  logprob = d_y - log s,  H = log s - (sum e^d d) / s.
    """
    kept = targets != ignore_index
    temperature = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device).expand(targets.shape)
    # Ignored rows are replaced, not multiplied by zero, so what they hold can reach neither value nor gradient.
    x = torch.where(kept[..., None], capped(masked(logits), softcap), logits.new_zeros(()))
    z = x / temperature[..., None]
    top = z.detach().amax(-1, keepdim=True)
    d = z - top
    e = d.exp()
    s = e.sum(-1)
    # p = 0 contributes 0 to the entropy, never 0 * inf; NaN stays NaN.
    finite_d = torch.where(d == -torch.inf, torch.zeros_like(d), d)
    entropy = s.log() - (e * finite_d).sum(-1) / s
    index = torch.where(kept, targets, 0)
    logprobs = d.gather(-1, index[..., None])[..., 0] - s.log()
    zero = torch.zeros_like(entropy)
    # Ties are those of the logits before the temperature, whose division may round two of them to one.
    more = {"is_top1": (x.argmax(-1) == index) & entropy.isfinite(), **extra_stats(d.detach())}
    more["mean_logits"] = (z.detach() - entropy.detach()[..., None] * 0.0).mean(-1)  # NaN where the row is
    more = {name: torch.where(kept, more[name], torch.zeros_like(more[name])) for name in extra}
    return TokenStats(torch.where(kept, logprobs, zero), torch.where(kept, entropy, zero), **more)


def extra_stats(d: Tensor) -> dict[str, Tensor]:
    """Of d = z - max z [..., V], those that are functions of log p = d - log s alone, p = e^d / s."""
    V = d.shape[-1]
    log_sum = d.exp().sum(-1)[..., None].log()
    log_p = d - log_sum
    p = log_p.exp()
    finite_log_p = torch.where(log_p == -torch.inf, torch.zeros_like(log_p), log_p)
    entropy = -(p * finite_log_p).sum(-1, keepdim=True)
    top, second = torch.nn.functional.pad(d, (0, 1), value=-torch.inf).topk(2).values.unbind(-1)
    return {
        "self_certainty": -math.log(V) - log_p.mean(-1),
        "varentropy": (p * (finite_log_p + entropy).square()).sum(-1),
        "log_sum_sq_probs": d.mul(2).exp().sum(-1).log() - 2 * log_sum[..., 0],
        "top_logprob": -log_sum[..., 0],
        "margin": top - second,
    }


def top_count(top_m: float | int, n: int) -> int:
    """m: a count (int), or floor(top_m * n) with `top_m` the fraction that it stands for; in 1..n."""
    numerator, denominator = top_fraction(top_m)
    m = numerator * n // denominator if denominator else numerator
    return min(max(1, m), n)


def entropy_scores(
    entropy: Tensor,
    *,
    answer_start: Tensor,
    fork_weight: float = 1.0,
    **layout: Any,
) -> EntropyScores:
    """S = -final + fork_weight * fork; the arguments are those of `gem_kernels.entropy_scores`."""
    x = completion_features(entropy, torch.zeros_like(entropy), answer_start=answer_start, **layout)
    score = torch.where(x.valid, -x.final_entropy + fork_weight * x.fork_entropy, 0.0)
    return EntropyScores(score, x.final_entropy, x.fork_entropy, x.valid)


def completion_features(
    entropy: Tensor,
    logprobs: Tensor,
    *,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    answer_start: Tensor,
    top_m: float | int = 0.1,
    no_answer: str = "tail",
    valid: Tensor | None = None,
) -> CompletionFeatures:
    """One sequence after the other; see `gem_kernels.completion_features` for the meaning of the arguments."""
    n_sequences = answer_start.shape[0]
    x = {name: entropy.new_zeros(n_sequences) for name in FEATURES}
    ok = torch.zeros(n_sequences, dtype=torch.bool, device=entropy.device)
    for i in range(n_sequences):
        if cu_seqlens is not None:
            here = slice(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))
            h, logp = entropy[here], logprobs[here]
            counted = torch.ones_like(h, dtype=torch.bool)
        else:
            positions = completion_mask[i].nonzero()[:, 0]
            here = slice(int(positions[0]), int(positions[-1]) + 1) if len(positions) else slice(0, 0)
            h, logp, counted = entropy[i, here], logprobs[i, here], completion_mask[i, here]
        start, length = int(answer_start[i]), h.shape[0]
        if not 0 <= start < length:
            if no_answer == "exclude":
                continue
            start = 4 * length // 5
        answer, reasoning = h[start:][counted[start:]], h[:start][counted[:start]]
        if len(answer) == 0 or (valid is not None and not bool(valid[i])):
            continue
        ok[i] = True
        x["final_entropy"][i] = answer.mean()
        if len(reasoning):
            x["fork_entropy"][i] = reasoning.sort(descending=True).values[: top_count(top_m, len(reasoning))].mean()
            x["reasoning_entropy"][i] = reasoning.mean()
        x["mean_entropy"][i], x["max_entropy"][i] = h[counted].mean(), h[counted].max()
        logp = logp[counted]
        x["mean_logprob"][i], x["sum_logprob"][i], x["min_logprob"][i] = logp.mean(), logp.sum(), logp.min()
        x["length"][i] = len(logp)
    return CompletionFeatures(**x, valid=ok)


def answer_start(
    token_ids: Tensor,
    marker: list[list[int]],
    *,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Token by token; see `gem_kernels.answer_start`. marker: a list of markers."""
    B = len(token_ids) if cu_seqlens is None else len(cu_seqlens) - 1
    starts = torch.full((B,), -1, dtype=torch.int64, device=token_ids.device)
    for i in range(B):
        if cu_seqlens is None:
            counted = completion_mask[i].nonzero()[:, 0].tolist()
            words = [int(w) if c else None for w, c in zip(token_ids[i], completion_mask[i])][min(counted, default=0) :]
        else:
            words = token_ids[int(cu_seqlens[i]) : int(cu_seqlens[i + 1])].tolist()
        for end in range(len(words) + 1):
            if any(end >= len(one) and words[end - len(one) : end] == one for one in marker):
                starts[i] = end
    return starts


def group_advantages(
    scores: Tensor,
    group_size: int | None = None,
    *,
    valid: Tensor | None = None,
    mapping: str = "identity",
    scale: str = "none",
    eps: float = 1e-4,
    group_ids: Tensor | None = None,
) -> Tensor:
    """A_i = f(S_i) - mean_group f(S), over the valid members; optionally / (std_group + eps). [B] -> [B]."""
    advantages = torch.zeros_like(scores)
    if group_ids is None:
        group_ids = torch.arange(scores.shape[0], dtype=torch.int64, device=scores.device) // group_size
    for group in group_ids.unique():
        members = (group_ids == group).nonzero()[:, 0]
        if valid is not None:
            members = members[valid[members]]
        s = scores[members]
        if len(s) < 2:
            continue
        if mapping == "identity":
            r = s
        elif mapping == "softmax":
            r = s.softmax(0)
        else:
            beats = (s[:, None] > s[None, :]).to(s.dtype) + 0.5 * (s[:, None] == s[None, :]).to(s.dtype)
            r = (beats.sum(1) - 0.5) / (len(s) - 1)
        r = r - r[0]  # equal members become exact zeros before the mean is taken
        a = r - r.mean()
        if scale == "group":
            a = torch.where(a == 0, torch.zeros_like(a), a / (r.std() + eps))
        advantages[members] = a
    return advantages


def sequence_weights(
    lengths: Tensor,
    valid: Tensor,
    loss_type: str,
    max_completion_length: int | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """c_i / Z: sum 1/valid, mean 1/(len_i valid), token 1/tokens, constant 1/(valid max_length). [B]."""
    n_valid = valid.sum()
    if denominator is not None:
        z = denominator
    elif loss_type == "token":
        z = (lengths * valid).sum()
    elif loss_type == "constant":
        z = n_valid * max_completion_length
    else:
        z = n_valid
    z = torch.as_tensor(z, dtype=torch.float32, device=lengths.device)
    c = 1.0 / lengths.clamp(min=1) if loss_type == "mean" else torch.ones_like(lengths, dtype=torch.float32)
    return torch.where(valid & (z != 0), c / torch.where(z == 0, torch.ones_like(z), z), torch.zeros_like(c))


def sega_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    answer_start: Tensor | None = None,
    group_size: int | None = None,
    fork_weight: float = 1.0,
    top_m: float | int = 0.1,
    no_answer: str = "tail",
    valid: Tensor | None = None,
    mapping: str = "identity",
    scale: str = "none",
    eps: float = 1e-4,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    advantages: Tensor | None = None,
    loss_type: str = "sum",
    max_completion_length: int | None = None,
    denominator: float | Tensor | None = None,
    score: LinearScore | None = None,
    group_ids: Tensor | None = None,
) -> SegaOutput:
    """L = -(1/Z) sum_i A_i c_i sum_t logprob_{i,t}, with everything but the log-probabilities held constant."""
    if completion_mask is not None:
        counted = completion_mask & (targets != ignore_index)
        sequence = torch.arange(targets.shape[0], dtype=torch.int64, device=targets.device)[:, None].expand(
            targets.shape
        )
        n_sequences = targets.shape[0]
    else:
        counted = targets != ignore_index
        n_sequences = cu_seqlens.shape[0] - 1
        sequence = torch.repeat_interleave(
            torch.arange(n_sequences, dtype=torch.int64, device=targets.device),
            (cu_seqlens[1:] - cu_seqlens[:-1]).long(),
        )
    stats = token_stats(
        logits,
        torch.where(counted, targets, ignore_index),
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
    )
    entropy = stats.entropy.detach()
    if answer_start is None:
        answer_start = torch.full((n_sequences,), -1, dtype=torch.int64, device=targets.device)
    layout = {"completion_mask": completion_mask, "cu_seqlens": cu_seqlens, "answer_start": answer_start}
    options = {"top_m": top_m, "no_answer": no_answer, "valid": valid}
    if score is None:
        scores = entropy_scores(entropy, fork_weight=fork_weight, **layout, **options)
    else:
        x = completion_features(entropy, stats.logprobs.detach(), **layout, **options)
        scores = EntropyScores(x.score(score), x.final_entropy, x.fork_entropy, x.valid)
    if advantages is None:
        advantages = group_advantages(
            scores.score, group_size, valid=scores.valid, mapping=mapping, scale=scale, eps=eps, group_ids=group_ids
        )
    advantages = torch.where(scores.valid, advantages.detach(), torch.zeros_like(advantages))
    lengths = stats.logprobs.new_zeros(n_sequences)
    lengths.index_add_(0, sequence[counted], lengths.new_ones(int(counted.sum())))
    weights = sequence_weights(lengths, scores.valid, loss_type, max_completion_length, denominator)
    per_token = (-advantages * weights).to(stats.logprobs.dtype)[sequence]
    # A token without weight counts for nothing, were its target impossible.
    dropped = ~counted | ((per_token == 0) & stats.logprobs.isneginf())
    loss = torch.where(dropped, torch.zeros_like(stats.logprobs), per_token * stats.logprobs).sum()
    return SegaOutput(
        loss,
        scores.score,
        scores.final_entropy,
        scores.fork_entropy,
        scores.valid,
        advantages,
        stats.logprobs.detach(),
        entropy,
    )
