"""The SEGA loss from hidden states, its gradients made with it: in one shot where a group fits the workspace or the
head is frozen, else in two phases."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments
from ..backends.types import RowGradients
from ..losses import check_loss, sequence_weights, token_counts, weighted_sum
from ..scores import Spans, completion_scores, counted_targets, group_advantages
from ..types import EntropyScores, LinearScore, SegaOutput
from .active_vocab import Report
from .head import HeadParameters, LinearArguments, TokenRows, check_head, host_layout, token_rows
from .one_shot import OneShot, reported, spread
from .products import Gradients, statistics, statistics_backward


@dataclass(frozen=True)
class SegaArguments:
    """What `fused_linear_sega_loss` takes beside LinearArguments, as the caller gave it."""

    completion_mask: Any
    cu_seqlens: Any
    answer_start: Any
    group_size: Any
    fork_weight: Any
    top_m: Any
    no_answer: Any
    valid: Any
    mapping: Any
    scale: Any
    eps: Any
    advantages: Any
    loss_type: Any
    max_completion_length: Any
    denominator: Any
    score: Any
    group_ids: Any = None


def sega(given: LinearArguments, of: SegaArguments, needs: tuple[bool, bool, bool]) -> tuple[SegaOutput, Gradients]:
    """The result, whose loss has no history, and the gradients of hidden, weight and bias, for an upstream scalar."""
    completion_mask, cu_seqlens, answer_start, advantages = (
        of.completion_mask, of.cu_seqlens, of.answer_start, of.advantages,
    )  # fmt: skip
    completion_mask = arguments.as_mask("completion_mask", completion_mask)
    valid = arguments.as_mask("valid", of.valid)
    targets, host = given.targets, None
    if isinstance(targets, Tensor):
        host = host_layout(targets, completion_mask, cu_seqlens)
        completion_mask, cu_seqlens = host.mask, host.cu_seqlens
        arguments.check_layout(targets, "targets", completion_mask, cu_seqlens)
        targets = counted_targets(targets, completion_mask, given.ignore_index)
        given = replace(given, targets=targets)
    head, options = check_head(given)
    B = arguments.check_layout(targets, "targets", completion_mask, cu_seqlens)
    check_loss(
        of.loss_type, of.max_completion_length, of.denominator, advantages, (of.group_size, of.group_ids), answer_start,
        of.no_answer, B, targets.device,
    )  # fmt: skip
    if answer_start is None:
        answer_start = torch.full((B,), -1, dtype=torch.int64, device=targets.device)
    spans = Spans(completion_mask, cu_seqlens, answer_start, of.top_m, of.no_answer, valid, given.backend)
    assert host is not None
    batch = _Batch(B, targets, spans, of.fork_weight, of.score, host.offsets)
    rows = token_rows(given.hidden.detach(), targets, head, options, host.rows)
    # Which sequences are valid depends on masks and answers alone, so Z is known before any entropy is.
    nothing = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    is_valid = batch.scores(nothing, nothing).valid
    counts = token_counts(targets, completion_mask, cu_seqlens, given.ignore_index)
    weights = sequence_weights(counts, is_valid, of.loss_type, of.max_completion_length, of.denominator)
    if advantages is not None:
        advantages = torch.where(is_valid, advantages.float(), 0.0)
    group = _Grouping(of.group_size, of.group_ids, of.mapping, of.scale, of.eps, given.backend)
    call = _Call(batch, rows, head, weights, needs, group, advantages)
    run_length = of.group_size if of.group_ids is None else max(1, B)
    bounds = batch.group_bounds(run_length, rows) if advantages is None else []
    path, run = "one_shot", _by_group
    longest = max((e - b for b, e in itertools.pairwise(bounds)), default=0)
    if longest > head.rows_per_chunk and not (needs == (True, False, False) and head.active_vocab is None):
        path, run = "two_phase", _by_group if head.shards is None else _two_phase
    logprobs, entropy, advantages, loss, gradients, report = run(call, bounds)
    scores = batch.scores(logprobs, entropy)
    out = SegaOutput(
        loss, scores.score, scores.final_entropy, scores.fork_entropy, scores.valid, advantages, logprobs, entropy,
        path, **reported(report),
    )  # fmt: skip
    return out, spread(gradients, given.hidden, rows)


@dataclass
class _Batch:
    """The sequences of a call, in either layout."""

    B: int
    targets: Tensor
    spans: Spans
    fork_weight: float
    score: LinearScore | None
    host_offsets: list[int] | None
    """`cu_seqlens`, where the host knows them."""

    def scores(self, logprobs: Tensor, entropy: Tensor, begin: int = 0, end: int | None = None) -> EntropyScores:
        """Of sequences [begin, end), from the statistics of all tokens."""
        end = self.B if end is None else end
        spans, tokens = self.spans, slice(None)
        if (begin, end) != (0, self.B):  # a slice of everything would hide a wrong length
            part: dict[str, Any] = {"answer_start": spans.answer_start[begin:end]}
            part["valid"] = None if spans.valid is None else spans.valid[begin:end]
            if spans.completion_mask is not None:
                tokens, part["completion_mask"] = slice(begin, end), spans.completion_mask[begin:end]
            else:
                assert self.host_offsets is not None
                tokens = slice(self.host_offsets[begin], self.host_offsets[end])
                part["cu_seqlens"] = spans.cu_seqlens[begin : end + 1] - tokens.start
            spans = replace(spans, **part)
        return completion_scores(entropy[tokens], logprobs[tokens], spans, self.fork_weight, self.score)

    def sequence_of(self, rows: TokenRows) -> Tensor:
        """The sequence each of the rows is in."""
        token = rows.kept
        if token is None:
            token = torch.arange(rows.total, dtype=torch.int64, device=self.targets.device)
        if self.spans.completion_mask is not None:
            return token // max(1, self.targets.shape[1])
        ends = self.spans.cu_seqlens[1:].long().contiguous()
        return torch.searchsorted(ends, token, right=True).clamp(max=max(0, self.B - 1))

    def group_bounds(self, group_size: Any, rows: TokenRows) -> list[int]:
        """Rows at which groups begin, and where the last ends; of all together, where the host knows no better."""
        if self.spans.completion_mask is not None:
            T = self.targets.shape[1]
            bounds = [s * T for s in range(0, self.B + 1, group_size)]
        elif self.host_offsets is not None:
            bounds = self.host_offsets[::group_size]
        else:
            return [0, len(rows)]
        if rows.kept_on_host is not None:
            at = torch.tensor(bounds, dtype=torch.int64, device="cpu")
            bounds = torch.searchsorted(rows.kept_on_host, at).tolist()
        return bounds


@dataclass(frozen=True)
class _Grouping:
    size: Any
    ids: Tensor | None
    """Of all sequences, which are then scored together."""
    mapping: str
    scale: str
    eps: float
    backend: str

    def advantages(self, scores: EntropyScores) -> Tensor:
        return group_advantages(
            scores.score,
            self.size,
            group_ids=self.ids,
            valid=scores.valid,
            mapping=self.mapping,
            scale=self.scale,
            eps=self.eps,
            backend=self.backend,
        )


@dataclass(frozen=True)
class _Call:
    """What both ways to the loss need."""

    batch: _Batch
    rows: TokenRows
    head: HeadParameters
    weights: Tensor
    """c_i / Z, [B]"""
    needs: tuple[bool, bool, bool]
    group: _Grouping
    advantages: Tensor | None
    """[B], where they are given."""


class _Made(NamedTuple):
    logprobs: Tensor
    entropy: Tensor
    advantages: Tensor
    loss: Tensor
    gradients: Gradients
    report: Report | None


def _merged(bounds: list[int], rows_per_chunk: int) -> list[tuple[int, int]]:
    """Runs of groups [g, h) whose rows fit one chunk; a larger group is a run of its own."""
    runs, begin = [], 0
    for g in range(1, len(bounds)):
        if bounds[g] - bounds[begin] > rows_per_chunk and g - 1 > begin:
            runs.append((begin, g - 1))
            begin = g - 1
    if begin < len(bounds) - 1:
        runs.append((begin, len(bounds) - 1))
    return runs


def _chunks(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    """[begin, end) in parts of `size` rows, what is over first."""
    firsts = list(range(end, begin, -size))[::-1]
    return [(max(begin, last - size), last) for last in firsts]


def _by_group(call: _Call, bounds: list[int]) -> _Made:
    """Runs of groups, one after the other: statistics, advantages, gradients.

    Where a run is more than one chunk, its last chunk's logits are still there when the advantages are known; those of
    the others are made again. Not where the head is frozen: see OneShot.
    """
    batch, rows, weights, advantages = call.batch, call.rows, call.weights, call.advantages
    shot = OneShot(rows, call.head, call.needs)
    sequence = batch.sequence_of(rows)
    logprobs, entropy = torch.zeros(2, len(rows), dtype=torch.float32, device=weights.device).unbind()
    known = torch.zeros(2, rows.total, dtype=torch.float32, device=weights.device)  # log-probs, entropies
    loss = torch.zeros((), dtype=torch.float32, device=weights.device)
    step = call.head.rows_per_chunk
    runs: list[tuple[int, int, slice | None]]
    if advantages is not None:
        runs = [(b, min(b + step, len(rows)), None) for b in range(0, len(rows), step)]
    else:
        size = batch.B // max(1, len(bounds) - 1)  # sequences from bound to bound
        advantages = torch.zeros_like(weights)
        runs = [(bounds[g], bounds[h], slice(g * size, h * size)) for g, h in _merged(bounds, step)]
    for begin, end, sequences in runs:
        chunks = _chunks(begin, end, step)
        later = len(chunks) > 1 and shot.weighs_later
        for first, last in chunks:
            logprobs[first:last], entropy[first:last] = shot.statistics(first, last)
            if later:
                shot.unit_gradients(begin, end, entropy[first:last])
        if sequences is not None:
            at = slice(begin, end) if rows.kept is None else rows.kept[begin:end]
            known[0, at], known[1, at] = logprobs[begin:end], entropy[begin:end]
            all_logprobs, all_entropy = known.view(2, *batch.targets.shape).unbind()
            scores = batch.scores(all_logprobs, all_entropy, sequences.start, sequences.stop)
            advantages[sequences] = call.group.advantages(scores)
        a = (-advantages * weights)[sequence[begin:end]]
        loss += weighted_sum(a, logprobs[begin:end])
        if later:
            shot.weigh(a)
            continue
        for first, last in reversed(chunks if any(call.needs) else []):
            shot.again(first, last)
            part = a[first - begin : last - begin]
            shot.gradients(entropy[first:last], part, torch.zeros_like(part))
    logprobs, entropy = (rows.spread(x).view(batch.targets.shape) for x in (logprobs, entropy))
    return _Made(logprobs, entropy, advantages, loss, shot.finish(), shot.report())


def _two_phase(call: _Call, bounds: list[int]) -> _Made:
    """Statistics of all, then gradients of all: over a sharded vocabulary the statistics then travel together."""
    batch, rows = call.batch, call.rows
    stats = statistics(rows, call.head)
    logprobs, entropy = (rows.spread(x).view(batch.targets.shape) for x in stats[:2])
    advantages = call.group.advantages(batch.scores(logprobs, entropy))
    a = (-advantages * call.weights)[batch.sequence_of(rows)]
    loss = weighted_sum(a, stats.logprobs)
    gradients: Gradients = (None, None, None)
    report = None
    if any(call.needs):
        vectors = RowGradients(*stats[1:], a, torch.zeros_like(a))
        gradients, report = statistics_backward(rows, call.head, vectors, call.needs)
    return _Made(logprobs, entropy, advantages, loss, gradients, report)
