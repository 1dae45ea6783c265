"""Token entropies and log-probs -> features and score of each completion; scores -> group advantages; on the CPU.

Of the features two implementations with the same arguments and results: compiled code (span_scores.cpp), and plain
torch on any device. The advantages are plain torch. What they compute: `gem_kernels.completion_features`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...types import FEATURES
from ..types import Completions, ScoreRule
from . import build
from .threads import run_on_threads

# Below this many tokens one thread is done before a second has started.
TOKENS_PER_THREAD = 1 << 15
FUNCTION = "gem_span_scores"

Scores = tuple[Tensor, Tensor, Tensor]
"""features [9, B] float32, score [B] float32, valid [B] bool."""


def span_scores(given: Completions, rule: ScoreRule, *, compiled: bool) -> Scores:
    """By compiled code if that is wanted and can be had. `cu_seqlens` are checked by the caller."""
    on_cpu = given.entropy.device.type == "cpu"
    function = _compiled if compiled and on_cpu and build.load() is not None else span_scores_torch
    return function(given, rule)


class _Spans(ctypes.Structure):
    """GemSpans of span_scores.cpp, field by field."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("entropy", "logprobs", "mask", "offsets", "starts", "valid")),
        *((n, ctypes.c_void_p) for n in ("features", "score", "ok")),
        *((n, ctypes.c_int64) for n in ("B", "T", "numerator", "denominator", "exclude")),
        ("weights", ctypes.c_double * len(FEATURES)),
        ("next", ctypes.c_void_p),
    ]


def _compiled(given: Completions, rule: ScoreRule) -> Scores:
    B = given.answer_start.shape[0]
    features = torch.empty(len(FEATURES), B, dtype=torch.float32, device="cpu")
    score = torch.empty(B, dtype=torch.float32, device="cpu")
    ok = torch.empty(B, dtype=torch.bool, device="cpu")
    inputs = {
        "entropy": given.entropy,
        "logprobs": given.logprobs,
        "mask": None if given.completion_mask is None else given.completion_mask.contiguous(),
        "offsets": None if given.cu_seqlens is None else given.cu_seqlens.long().contiguous(),
        "starts": given.answer_start.long().contiguous(),
        "valid": None if given.valid is None else given.valid.contiguous(),
        "features": features,
        "score": score,
        "ok": ok,
    }
    spans = _Spans(
        **{name: None if x is None else x.data_ptr() for name, x in inputs.items()},
        B=B,
        T=given.entropy.numel() // max(1, B),
        numerator=rule.numerator,
        denominator=rule.denominator,
        exclude=rule.exclude,
        weights=(ctypes.c_double * len(FEATURES))(*rule.weights),
    )
    run_on_threads(
        getattr(build.load(), FUNCTION),
        spans,
        min(B, 1 + given.entropy.numel() // TOKENS_PER_THREAD),
    )
    return features, score, ok


def span_scores_torch(given: Completions, rule: ScoreRule) -> Scores:
    """One completion after the other, the top m by `torch.topk` (a selection). On a GPU this waits for the device."""
    entropy, logprobs, completion_mask, cu_seqlens, answer_start, valid = given
    starts = answer_start.tolist()
    usable = [True] * len(starts) if valid is None else valid.tolist()
    offsets = None if cu_seqlens is None else cu_seqlens.tolist()
    features = torch.zeros(len(FEATURES), len(starts), dtype=torch.float64, device="cpu")
    score = torch.zeros(len(starts), dtype=torch.float64, device="cpu")
    ok = torch.zeros(len(starts), dtype=torch.bool, device="cpu")
    used = torch.tensor(rule.weights, dtype=torch.float64, device="cpu")
    for i, start in enumerate(starts):
        if offsets is not None:
            span, counted = slice(offsets[i], offsets[i + 1]), None
            h, logp = entropy[span], None if logprobs is None else logprobs[span]
        else:
            positions = completion_mask[i].nonzero()[:, 0]
            span = slice(int(positions[0]), int(positions[-1]) + 1) if len(positions) else slice(0, 0)
            h, counted = entropy[i, span], completion_mask[i, span]
            logp = None if logprobs is None else logprobs[i, span]
        n = h.shape[0]
        found = 0 <= start < n
        start = start if found else 4 * n // 5
        answer, reasoning = h[start:], h[:start]
        if counted is not None and len(positions) < n:
            answer, reasoning = answer[counted[start:]], reasoning[counted[:start]]
            logp = None if logp is None else logp[counted]
        if not usable[i] or len(answer) == 0 or (rule.exclude and not found):
            continue
        ok[i] = True
        features[:, i] = _features(answer.double(), reasoning.double(), logp, rule)
        score[i] = torch.where(used == 0, 0.0, used * features[:, i]).sum()
    device = entropy.device
    return features.to(device, torch.float32), score.to(device, torch.float32), ok.to(device)


def _features(answer: Tensor, reasoning: Tensor, logp: Tensor | None, rule: ScoreRule) -> Tensor:
    """The features of one valid completion, [9] float64."""
    everything = torch.cat([reasoning, answer])
    zero = everything.new_zeros(())
    before = fork = mean_logprob = sum_logprob = min_logprob = zero
    if len(reasoning):
        m = rule.numerator * len(reasoning) // rule.denominator if rule.denominator else rule.numerator
        fork = reasoning.topk(min(max(m, 1), len(reasoning)), sorted=False).values.mean()
        before = reasoning.mean()
    if logp is not None:
        logp = logp.double()
        mean_logprob, sum_logprob, min_logprob = logp.mean(), logp.sum(), logp.amin()
    length = everything.new_tensor(len(everything))
    return torch.stack([
        answer.mean(), fork, before, everything.mean(), everything.amax(), mean_logprob, sum_logprob, min_logprob,
        length,
    ])  # fmt: skip


def over_deviation(centred: Tensor, n: Tensor, eps: float) -> Tensor:
    """[P, G], of n [P, 1] members, over their sample deviation + eps. Equal members stay zeros, whatever eps."""
    deviation = ((centred * centred).sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    return torch.where(centred == 0, 0.0, centred / (deviation + eps))


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
        a = over_deviation(a, n, eps)
    return torch.where(member & (n > 1), a, 0.0).reshape(-1)
