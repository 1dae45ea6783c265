"""Scores of sequences and advantages of groups in plain torch, on any device."""

from __future__ import annotations

import torch


def span_scores(
    entropy, completion_mask, cu_seqlens, answer_start, valid, fork_weight, top_numerator, top_denominator, exclude
):
    """One sequence after the other, the top m by `torch.topk` (a selection). On a GPU this waits for the device."""
    starts = answer_start.tolist()
    usable = [True] * len(starts) if valid is None else valid.tolist()
    offsets = None if cu_seqlens is None else cu_seqlens.tolist()
    score, final, fork = torch.zeros(3, len(starts), dtype=torch.float64, device="cpu").unbind()
    ok = torch.zeros(len(starts), dtype=torch.bool, device="cpu")
    for i, start in enumerate(starts):
        if offsets is not None:
            values, counted = entropy[offsets[i] : offsets[i + 1]], None
        else:
            positions = completion_mask[i].nonzero()[:, 0]
            first, end = (int(positions[0]), int(positions[-1]) + 1) if len(positions) else (0, 0)
            values, counted = entropy[i, first:end], completion_mask[i, first:end]
        n = values.shape[0]
        found = 0 <= start < n
        start = start if found else 4 * n // 5
        answer, reasoning = values[start:], values[:start]
        if counted is not None and len(positions) < n:
            answer, reasoning = answer[counted[start:]], reasoning[counted[:start]]
        if not usable[i] or len(answer) == 0 or (exclude and not found):
            continue
        ok[i] = True
        final[i] = answer.double().mean()
        if len(reasoning):
            m = top_numerator * len(reasoning) // top_denominator if top_denominator else top_numerator
            fork[i] = reasoning.topk(min(max(m, 1), len(reasoning)), sorted=False).values.double().mean()
        score[i] = fork_weight * fork[i] - final[i]
    return (*tuple(x.to(entropy.device, torch.float32) for x in (score, final, fork)), ok.to(entropy.device))


def group_advantages(scores, group_size, valid, mapping, scale, eps):
    """[P, G] at once, with no wait for the device."""
    s = scores.view(-1, group_size)
    member = torch.ones_like(s, dtype=torch.bool) if valid is None else valid.view(-1, group_size)
    n = member.sum(1, keepdim=True)
    outside = s.new_full((), -torch.inf)
    if mapping == "identity":
        r = s
    elif mapping == "softmax":
        r = torch.where(n > 0, torch.where(member, s, outside).softmax(1), 0.0)
    else:
        beats = (s[:, :, None] > s[:, None, :]).to(s.dtype) + 0.5 * (s[:, :, None] == s[:, None, :]).to(s.dtype)
        r = ((beats * member[:, None, :]).sum(2) - 0.5) / (n - 1).clamp(min=1)
    # Less the largest, so that equal members are exact zeros before the mean is taken.
    top = torch.where(member, r, outside).amax(1, keepdim=True)
    r = torch.where(member, r - top, 0.0)
    a = torch.where(member, r - r.sum(1, keepdim=True) / n.clamp(min=1), 0.0)
    if scale == "group":
        # Equal members stay zeros, whatever eps.
        a = torch.where(a == 0, 0.0, a / (((a * a).sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt() + eps))
    return torch.where(member & (n > 1), a, 0.0).reshape(-1)
