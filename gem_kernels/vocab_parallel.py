"""A vocabulary that is cut among the ranks of a process group: what one shard of it cannot know alone.

Each rank has the logits of its own words, and makes their statistics by the same row kernels (a target in another shard
is NO_TARGET there); four numbers a row travel. With (m_l, log s_l, H_l) of shard l, M = max m_l, and

    a_l = (m_l - M) / tau + log s_l        log s = log sum_l e^(a_l)        log w_l = a_l - log s

w_l is the probability of shard l, and

    H = sum_l w_l (H_l - log w_l)          logprob(y) = logprob_l(y) + log w_l,  l the shard of y

By the largest a_l, called a, and r = sum of e^(a_l - a) over the others: log w = a_l - a - log1p(r), so that a row
that is sure of one word keeps the digits of its small entropy. A shard in which all is -inf has w = 0 and counts 0.
With M, log s and H of the whole row the gradient of a shard's logits is local, and so are those of its weight and bias;
the gradient of the hidden states is the sum of all shards', taken in float32.

Collectives: one small exchange a call, which compares the ranks' arguments (none when `vocab_starts` is given); one
all_gather of [4, n] a chunk (one shot) or a call (statistics); one all_reduce of [n, D] a chunk with gradients, which
runs beside the next chunk's products.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import arguments
from .backends.types import NO_TARGET, RowOptions, RowStats
from .types import FLOOR, VocabParallel

# Local marks; no word of a shard has such a number.
IGNORED = -100
OUTSIDE = -1


def _gather(out: Tensor, part: Tensor, group: Any) -> None:
    """`part` of every rank -> `out` [count, ...]."""
    # torch 2.13 renames it, and warns of the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out.view(-1), part.view(-1), group=group)


@dataclass(frozen=True)
class Shards:
    """Rank r of `group` holds words [starts[r], starts[r + 1])."""

    group: Any
    starts: tuple[int, ...]
    rank: int
    ignore_index: int
    """The caller's. Local targets have IGNORED in its place, whatever it is."""
    reduces_hidden: bool = True
    """The gradient of the hidden states is summed over the ranks."""

    @property
    def count(self) -> int:
        return len(self.starts) - 1

    @property
    def largest(self) -> int:
        """Words in the largest shard: what a chunk is cut by, so that all ranks cut alike."""
        return max(end - begin for begin, end in itertools.pairwise(self.starts))

    def local_targets(self, targets: Tensor) -> Tensor:
        """Ids of the whole vocabulary -> rows of this shard, NO_TARGET, IGNORED, or OUTSIDE (of any shard)."""
        begin, end = self.starts[self.rank], self.starts[self.rank + 1]
        elsewhere = torch.where((targets >= 0) & (targets < self.starts[-1]), NO_TARGET, OUTSIDE)
        local = torch.where((targets >= begin) & (targets < end), targets - begin, elsewhere)
        return torch.where(targets == self.ignore_index, IGNORED, local)

    def merge(self, stats: RowStats, targets: Tensor, options: RowOptions) -> RowStats:
        """Statistics of this shard's logits, and its local targets, [n] -> those of the whole rows, on every rank.

        One all_gather. All ranks get the same bits.
        """
        logprobs, entropy, row_max, log_sum = stats
        empty = log_sum.isnan() & (row_max <= FLOOR)  # -inf alone; poisoned rows have a row_max of NaN or +inf
        logprobs = torch.where(targets >= 0, logprobs.masked_fill(empty, -torch.inf), torch.inf)
        row_max = row_max.masked_fill(empty, -torch.inf)
        packed = torch.stack((logprobs, entropy.masked_fill(empty, 0), row_max, log_sum.masked_fill(empty, 0)))
        gathered = packed.new_empty(self.count, *packed.shape)
        _gather(gathered, packed, self.group)

        tau = options.temperature if options.temperatures is None else options.temperatures.double()
        logprobs, entropy, row_max, log_sum = gathered.double().unbind(1)  # [count, n]
        top_max = row_max.amax(0)
        a = torch.where(row_max == -torch.inf, -torch.inf, (row_max - top_max) / tau + log_sum)
        top, i_top = a.max(0)
        less = a - top
        log_rest = less.exp().scatter_(0, i_top[None], 0.0).sum(0).log1p()
        log_w = less - log_rest
        w = log_w.exp()
        entropy = torch.where(w == 0, 0.0, w * (entropy - log_w)).sum(0)
        log_sum = top + log_rest
        logprobs = torch.where(logprobs == torch.inf, torch.inf, logprobs + log_w).amin(0)
        # A row of -inf in all shards: top - top is NaN. A row that is NaN in one: so is its log_w in all.
        bad = log_rest.isnan() | log_sum.isnan()
        ignored = targets == IGNORED
        merged = (
            x.masked_fill(bad, torch.nan).masked_fill(ignored, 0.0).float()
            for x in (logprobs, entropy, top_max, log_sum)
        )
        return RowStats(*merged)

    def merge_all(
        self, stats: Tensor, targets: Tensor, options: RowOptions, workspace_bytes: int, rows_per_chunk: int
    ) -> None:
        """`merge` of [4, N] in place, in as few collectives as leave its temporaries under the workspace."""
        step = max(rows_per_chunk, workspace_bytes // (BYTES_PER_MERGED_STATISTIC * self.count))
        for begin in range(0, targets.shape[0], step):
            part = slice(begin, begin + step)
            stats[:, part] = torch.stack(self.merge(RowStats(*stats[:, part]), targets[part], options.of(part)))


# What the statistics of given logits are merged within.
MERGED_BYTES = 64 * 2**20
# Of `merge`, for each row and rank: four float32, four and some eight more float64.
BYTES_PER_MERGED_STATISTIC = 128


@dataclass
class Reduction:
    """Sums over the ranks, one under way at a time, so that it runs beside the products of the next chunk."""

    shards: Shards
    pending: tuple | None = field(default=None, init=False)

    def start(self, part: Tensor, out: Tensor) -> None:
        """`part`, summed over the ranks in place, goes to `out` (may be `part`), at the latest at `finish`."""
        self.finish()
        self.pending = (dist.all_reduce(part, group=self.shards.group, async_op=True), part, out)

    def finish(self) -> None:
        if self.pending is not None:
            work, part, out = self.pending
            self.pending = None
            work.wait()
            if part is not out:
                out.copy_(part)


# Before anything: what the ranks hold.

FACTS = (
    "the shard's size",
    "the number of tokens",
    "the sum of the targets",
    "hidden's width",
    "whether hidden needs a gradient (1 or 0)",
    "whether weight or bias needs a gradient (1 or 0)",
    "the dtype of hidden",
    "compute_dtype",
    "logits_dtype",
    "workspace_bytes (0: the default)",
    "ignore_index",
    "reduce_hidden_grad (1 or 0)",
)


# The same, of a call with logits.
LOGITS_FACTS = (*FACTS[:3], "ignore_index")


def check_group(parallel: Any) -> int:
    """-> the number of ranks; 1 without a group."""
    if parallel is None:
        return 1
    if not isinstance(parallel, VocabParallel):
        arguments.fail("vocab_parallel", "a gem_kernels.VocabParallel or None", repr(parallel))
    process_group, vocab_starts = parallel.process_group, parallel.vocab_starts
    arguments.check_flag("reduce_hidden_grad", parallel.reduce_hidden_grad)
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        arguments.fail("process_group", "a torch.distributed process group this rank is in", repr(process_group))
    count = process_group.size()
    if vocab_starts is not None:
        whole = isinstance(vocab_starts, (tuple, list)) and all(type(v) is int for v in vocab_starts)
        if not whole or len(vocab_starts) != count + 1 or vocab_starts[0] != 0:
            arguments.fail("vocab_starts", f"{count + 1} integers, from 0 to the whole vocabulary's size", vocab_starts)
        if any(end <= begin for begin, end in itertools.pairwise(vocab_starts)):
            arguments.fail("vocab_starts", "increasing", vocab_starts)
    return count


def check_whole(parallel: Any, V: int, name: str) -> None:
    """Of a group of one rank, or of none. name: of the tensor that has V words."""
    if parallel is not None and parallel.vocab_starts is not None and parallel.vocab_starts[1] != V:
        arguments.fail("vocab_starts", f"(0, {V}), as `{name}` has it", parallel.vocab_starts)


def meet(
    parallel: VocabParallel,
    facts: tuple[int, ...] | None,
    targets: Any,
    ignore_index: Any,
    names: tuple[str, ...] = FACTS,
    tensor: str = "weight",
) -> Shards | None:
    """Where each rank's words begin. Facts of this rank: see `names`, without the targets' sum; None where its
    arguments were wrong, so that the other ranks stop too. tensor: what has this rank's words."""
    process_group, vocab_starts = parallel.process_group, parallel.vocab_starts
    rank, count = process_group.rank(), process_group.size()
    if vocab_starts is not None:
        size = vocab_starts[rank + 1] - vocab_starts[rank]
        if facts is not None and facts[0] != size:
            arguments.fail(tensor, f"{size} words, as `vocab_starts` says of rank {rank}", facts[0])
        return Shards(process_group, tuple(vocab_starts), rank, ignore_index, parallel.reduce_hidden_grad)
    device = targets.device if isinstance(targets, Tensor) else torch.device("cpu")
    mine = torch.zeros(1 + len(names), dtype=torch.int64, device=device)
    if facts is not None:
        size, tokens, *rest = facts
        mine = torch.tensor([1, size, tokens, 0, *rest], dtype=torch.int64, device=device)
        mine[3] = targets.sum()
    gathered = mine.new_empty(count, mine.shape[0])
    _gather(gathered, mine, process_group)
    everyone = gathered.tolist()
    if facts is None:
        return None
    for r, (fine, *theirs) in enumerate(everyone):
        if not fine:
            arguments.fail("process_group", "of ranks whose arguments are right", f"a ValueError on rank {r}")
        for name, here, there in zip(names[1:], everyone[rank][2:], theirs[1:]):
            if here != there:
                arguments.fail("process_group", f"of ranks that agree on {name}: {here} here", f"{there} on rank {r}")
    starts = [0]
    for _, size, *_ in everyone:
        starts.append(starts[-1] + size)
    return Shards(process_group, tuple(starts), rank, ignore_index, parallel.reduce_hidden_grad)
