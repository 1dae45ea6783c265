"""Hidden states and the head's weight -> token statistics and their gradients; the logits are never whole.

Rows go through the library's matrix product, a chunk at a time, into one workspace of at most `workspace_bytes`; the
row kernels work on it in place. With G = 2 N D V flop: statistics 1 G; their backward, which makes the logits again,
3 G more (`linear_token_stats`: two phase, 4 G); a loss whose gradient is known chunk by chunk 3 G (`OneShot`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import arguments, vocab_parallel
from .active_vocab import ActiveProducts, Report, check_threshold
from .backends.rows import check_values, rows_backward, rows_forward
from .types import TokenStats

WORKSPACE_BYTES = 128 * 2**20
# A CPU's products lose nothing at 300 rows a chunk, and the workspace counts beside a small model's own memory.
WORKSPACE_BYTES_CPU = 64 * 2**20
# A CPU's product of fewer rows adds its V terms one after the other: an error of 3e-5, where slices have 3e-7.
FEW_ROWS = 4
FEW_ROWS_SLICE = 512


@dataclass(frozen=True)
class Head:
    """logits = softcap(logit_scale * (hidden @ weight.T + bias)), and how to go about it. Checked by `check_head`.

    The scale costs nothing: the row kernels see hidden @ weight.T + bias, with softcap / scale and temperature / scale.
    """

    weight: Tensor
    """[V, D]"""
    bias: Tensor | None
    softcap: float | None
    """of the unscaled product"""
    logits_dtype: torch.dtype
    ignore_index: int
    backend: str
    workspace_bytes: int
    shards: vocab_parallel.Shards | None = None
    """Where `weight` is one shard of several. Then `ignore_index` is that of local targets."""
    active_vocab: float | None = None
    """Of the backward products: see active_vocab.py."""

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of dL/dlogits, an operand of the backward products: a GPU multiplies 16-bit numbers, a CPU what it has."""
        return self.weight.dtype if self.weight.is_cuda else self.logits_dtype

    @property
    def rows_per_chunk(self) -> int:
        V = self.weight.shape[0] if self.shards is None else self.shards.largest
        bytes_per_logit = self.logits_dtype.itemsize
        if self.gradient_dtype != self.logits_dtype:
            bytes_per_logit += self.gradient_dtype.itemsize
        return max(1, self.workspace_bytes // (V * bytes_per_logit))


@dataclass(frozen=True)
class TokenRows:
    """The rows of a call, flat: hidden [N, D], targets [N] int64, one temperature or one for each row."""

    hidden: Tensor
    targets: Tensor
    temperature: float
    temperatures: Tensor | None
    kept: Tensor | None
    """Indices of the rows that count among `total`, or None for all. Only on the CPU: a count would wait for a GPU."""
    total: int
    ignore_index: int

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def chunk(self, begin: int, end: int) -> tuple[Tensor, Tensor, float, Tensor | None]:
        temperatures = None if self.temperatures is None else self.temperatures[begin:end]
        hidden, targets = self.hidden[begin:end], self.targets[begin:end]
        if hidden.is_cuda:
            # Ignored rows are still here; whatever they hold must not reach dWeight as 0 * NaN.
            hidden = hidden.masked_fill((targets == self.ignore_index)[:, None], 0.0)
        return hidden, targets, self.temperature, temperatures

    def spread(self, values: Tensor) -> Tensor:
        """[len(self), ...] -> [total, ...], zeros where a row was dropped."""
        if self.kept is None:
            return values
        return values.new_zeros(self.total, *values.shape[1:]).index_copy_(0, self.kept, values)

    def gather(self, values: Tensor) -> Tensor:
        """[total] -> [len(self)]."""
        return values.contiguous() if self.kept is None else values[self.kept]


def check_head(
    hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, logits_dtype, workspace_bytes,
    backend, process_group=None, vocab_starts=None, active_vocab=None,
) -> tuple[Head, float, Tensor | None]:  # fmt: skip
    """-> the head, and the temperature of the unscaled product: a number, or one for each row."""
    sharded = vocab_parallel.check_group(process_group, vocab_starts) > 1
    try:
        head, number, rows = _check_own(
            hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, logits_dtype,
            workspace_bytes, backend,
        )  # fmt: skip
    except ValueError:
        if sharded:
            vocab_parallel.meet(process_group, vocab_starts, None, targets, ignore_index)
        raise
    V = weight.shape[0]
    if sharded:
        needs_hidden = hidden.requires_grad and torch.is_grad_enabled()
        dtypes = (arguments.LOGIT_DTYPES.index(x) for x in (hidden.dtype, head.logits_dtype))
        facts = (V, targets.numel(), hidden.shape[-1], needs_hidden, *dtypes, head.workspace_bytes, ignore_index)
        shards = vocab_parallel.meet(process_group, vocab_starts, facts, targets, ignore_index)
        head, V = replace(head, shards=shards, ignore_index=vocab_parallel.IGNORED), shards.starts[-1]
    elif vocab_starts is not None and vocab_starts[1] != V:
        arguments.fail("vocab_starts", f"(0, {V}), as `weight` has it", vocab_starts)
    check_values(targets, rows, ignore_index, V)
    head = replace(head, active_vocab=check_threshold(active_vocab, sharded))
    return head, number / logit_scale, None if rows is None else rows / logit_scale


def _check_own(
    hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, logits_dtype, workspace_bytes,
    backend,
) -> tuple[Head, float, Tensor | None]:  # fmt: skip
    """`check_head` of what this rank holds, but for the values inside tensors; the temperature as it was given."""
    arguments.check_tensor("hidden", hidden, dtypes=arguments.LOGIT_DTYPES)
    if hidden.dim() < 1 or hidden.shape[-1] < 1:
        arguments.fail("hidden", "of shape [..., D] with D at least 1", tuple(hidden.shape))
    arguments.check_tensor("weight", weight, dtypes=(hidden.dtype,), device=hidden.device)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < 1:
        arguments.fail("weight", f"of shape [V, {hidden.shape[-1]}]", tuple(weight.shape))
    arguments.check_tensor("targets", targets, dtypes=(torch.int64, torch.int32), device=hidden.device)
    if targets.shape != hidden.shape[:-1]:
        arguments.fail(
            "targets", f"of shape {tuple(hidden.shape[:-1])}, `hidden` less its last axis", tuple(targets.shape)
        )
    if bias is not None:
        arguments.check_tensor("bias", bias, shape=weight.shape[:1], dtypes=(weight.dtype,), device=hidden.device)
    arguments.check_number("logit_scale", logit_scale, above=0.0)
    softcap = arguments.check_softcap(softcap)
    number, rows = arguments.check_temperature(temperature, targets.shape, hidden.device)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        arguments.fail("ignore_index", "an integer", repr(ignore_index))
    if logits_dtype is None:
        logits_dtype = hidden.dtype
    if logits_dtype not in (hidden.dtype, torch.float32):
        arguments.fail("logits_dtype", f"{hidden.dtype} or torch.float32", logits_dtype)
    if workspace_bytes is None:
        workspace_bytes = WORKSPACE_BYTES_CPU if hidden.device.type == "cpu" else WORKSPACE_BYTES
    arguments.check_count("workspace_bytes", workspace_bytes)
    head = Head(
        weight.detach(),
        None if bias is None else bias.detach(),
        None if softcap is None else softcap / logit_scale,
        logits_dtype,
        ignore_index,
        arguments.check_backend(backend, hidden.device),
        workspace_bytes,
    )
    return head, number, rows


def token_rows(
    hidden: Tensor, targets: Tensor, temperature: float, temperatures: Tensor | None, head: Head
) -> TokenRows:
    """Flattens; on the CPU rows that are ignored are dropped, before any product."""
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).to(torch.int64)
    if head.shards is not None:
        targets = head.shards.local_targets(targets)
    total, kept = hidden.shape[0], None
    if hidden.device.type == "cpu" and bool((targets == head.ignore_index).any()):
        kept = (targets != head.ignore_index).nonzero()[:, 0]
        hidden, targets = hidden[kept], targets[kept]
        temperatures = None if temperatures is None else temperatures[kept]
    return TokenRows(hidden, targets.contiguous(), temperature, temperatures, kept, total, head.ignore_index)


class Products:
    """The head's four products of one chunk: logits, and the gradients of hidden, weight and bias.

    Gradients of weight and bias gather in float32 over all chunks. A gradient that nobody needs costs neither memory
    nor a product. Temporaries stay under the workspace: what must be converted is, a slice of the vocabulary at a time.
    """

    def __init__(self, head: Head, n_rows: int, needs: tuple[bool, bool, bool]):
        self.head = head
        self.V, self.D = head.weight.shape
        self.needs_hidden, self.needs_weight, self.needs_bias = needs
        device = head.weight.device
        n_rows = min(n_rows, head.rows_per_chunk)
        self.workspace = torch.empty(n_rows, self.V, dtype=head.logits_dtype, device=device)
        self.gradient_workspace = self.workspace
        if any(needs) and head.gradient_dtype != head.logits_dtype:
            self.gradient_workspace = torch.empty(n_rows, self.V, dtype=head.gradient_dtype, device=device)
        self.grad_weight = torch.zeros(self.V, self.D, device=device) if self.needs_weight else None
        self.grad_bias = torch.zeros(self.V, device=device) if self.needs_bias else None
        self.slice = max(1, min(self.V, head.workspace_bytes // (4 * max(self.D, n_rows))))
        self.reduction = None if head.shards is None else vocab_parallel.Reduction(head.shards)
        self.active = None
        if head.active_vocab is not None and (self.needs_hidden or self.needs_weight):
            self.active = ActiveProducts(head.weight, n_rows, head.active_vocab, needs[:2], head.workspace_bytes)

    def _slices(self):
        return ((v, min(v + self.slice, self.V)) for v in range(0, self.V, self.slice))

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, V], in the workspace."""
        head, out = self.head, self.workspace[: hidden.shape[0]]
        if hidden.dtype == head.logits_dtype:
            torch.mm(hidden, head.weight.t(), out=out)
        elif hidden.is_cuda:
            torch.mm(hidden, head.weight.t(), out_dtype=head.logits_dtype, out=out)
        else:
            hidden = hidden.float()
            for v, w in self._slices():
                torch.mm(hidden, head.weight[v:w].float().t(), out=out[:, v:w])
        return out if head.bias is None else out.add_(head.bias)

    def gradient(self, rows: int) -> Tensor:
        """Where dL/dlogits of a chunk is written: over its logits, unless the products want another dtype."""
        return self.gradient_workspace[:rows]

    def backward(self, gradient: Tensor, chunk: tuple, grad_hidden: Tensor | None, a: Tensor, b: Tensor) -> None:
        """dL/dlogits [n, V]: adds to grad_weight and grad_bias, writes grad_hidden [n, D].

        Of the chunk as TokenRows gives it, with a = dL/dlogprob and b = dL/dentropy.
        """
        hidden, targets, tau, taus = chunk
        done = False
        if self.active is not None:
            weights = (a.abs() + b.abs()) / (tau if taus is None else taus)
            done = self.active.backward(gradient, hidden, grad_hidden, self.grad_weight, targets, weights)
        if self.needs_hidden and not done:
            self._hidden(gradient, grad_hidden)
        if self.needs_weight and not done:
            self._weight(gradient, hidden)
        if self.needs_bias:
            self.grad_bias += gradient.sum(0, dtype=torch.float32)

    def _hidden(self, gradient: Tensor, out: Tensor) -> None:
        weight, total = self.head.weight, out
        if not gradient.is_cuda and gradient.shape[0] < FEW_ROWS:
            total = torch.zeros(out.shape)
            for v in range(0, self.V, FEW_ROWS_SLICE):
                total += gradient[:, v : v + FEW_ROWS_SLICE].float() @ weight[v : v + FEW_ROWS_SLICE].float()
        elif gradient.dtype == weight.dtype and (self.reduction is None or weight.dtype == torch.float32):
            torch.mm(gradient, weight, out=out)
        elif gradient.is_cuda:
            total = torch.mm(gradient, weight, out_dtype=torch.float32)
        else:
            total = torch.zeros(out.shape, device=out.device)
            for v, w in self._slices():
                total.addmm_(gradient[:, v:w].float(), weight[v:w].float())
        if self.reduction is not None:
            self.reduction.start(total, out)
        elif total is not out:
            out.copy_(total)

    def _weight(self, gradient: Tensor, hidden: Tensor) -> None:
        if not gradient.is_cuda:
            hidden = hidden.float()
            if gradient.dtype == torch.float32:
                self.grad_weight.addmm_(gradient.t(), hidden)
                return
            for v, w in self._slices():
                self.grad_weight[v:w].addmm_(gradient[:, v:w].float().t(), hidden)
        elif gradient.dtype == torch.float32:
            self.grad_weight.addmm_(gradient.t(), hidden)
        else:
            for v, w in self._slices():
                self.grad_weight[v:w] += torch.mm(gradient[:, v:w].t(), hidden, out_dtype=torch.float32)

    def report(self, grad_hidden: Tensor | None) -> Report | None:
        """Of the active vocabulary, after the last chunk; None without one."""
        if self.active is None:
            return None
        self.active.add_pending(self.grad_weight)
        return self.active.report(grad_hidden, self.grad_weight)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """grad_weight and grad_bias in the head's dtype. Until here the last grad_hidden may be on its way."""
        if self.reduction is not None:
            self.reduction.finish()
        if self.active is not None:
            self.active.add_pending(self.grad_weight)
        dtype = self.head.weight.dtype
        return tuple(None if g is None else g.to(dtype) for g in (self.grad_weight, self.grad_bias))


def statistics(rows: TokenRows, head: Head) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, row_max, log_sum, each [len(rows)]; 1 G."""
    out = torch.zeros(4, len(rows), device=rows.hidden.device)
    products = Products(head, len(rows), (False, False, False))
    for begin in range(0, len(rows), head.rows_per_chunk):
        end = min(begin + head.rows_per_chunk, len(rows))
        hidden, targets, tau, taus = rows.chunk(begin, end)
        logits = products.logits(hidden)
        stats = rows_forward(logits[None], targets, tau, taus, head.softcap, head.ignore_index, head.backend)
        for row, values in zip(out, stats):
            row[begin:end] = values
    if head.shards is not None:
        bounds = (head.workspace_bytes, head.rows_per_chunk)
        head.shards.merge_all(out, rows.targets, rows.temperature, rows.temperatures, *bounds)
    return tuple(out)


def statistics_backward(rows, head, stats, grad_logprobs, grad_entropy, needs):
    """(dL/dhidden, dL/dweight, dL/dbias), None where not needed; and the report of the active vocabulary, or None.

    The logits are made again, so 1 G + up to 2 G.
    """
    _, entropy, row_max, log_sum = stats
    products = Products(head, len(rows), needs)
    grad_hidden = torch.empty_like(rows.hidden) if needs[0] else None
    for begin in range(0, len(rows), head.rows_per_chunk):
        end = min(begin + head.rows_per_chunk, len(rows))
        chunk = hidden, targets, tau, taus = rows.chunk(begin, end)
        logits, gradient = products.logits(hidden), products.gradient(end - begin)
        parts = [x[begin:end].contiguous() for x in (row_max, log_sum, entropy, grad_logprobs, grad_entropy)]
        rows_backward(
            gradient[None], logits[None], targets, tau, taus, head.softcap, head.ignore_index, parts, head.backend
        )
        products.backward(gradient, chunk, None if grad_hidden is None else grad_hidden[begin:end], *parts[3:])
    gradients = (grad_hidden, *products.gradients())
    return gradients, products.report(grad_hidden)


class OneShot:
    """Statistics and gradients from one making of the logits: 3 G in all.

    Call `statistics(begin, end)`, decide dL/dlogprob and dL/dentropy of these rows, call `gradients` with
    them; chunk after chunk. `finish` gives the gradients. A chunk is at most head.rows_per_chunk rows. Where that
    takes the statistics of more rows, `again(begin, end)` makes the logits of an earlier chunk once more.
    """

    def __init__(self, rows: TokenRows, head: Head, needs: tuple[bool, bool, bool]):
        self.rows, self.head, self.needs = rows, head, needs
        self.products = Products(head, len(rows), needs)
        self.norms = torch.empty(2, len(rows), device=rows.hidden.device)
        """row_max and log_sum"""
        self.grad_hidden = torch.zeros_like(rows.hidden) if needs[0] else None

    def statistics(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """logprobs, entropy of rows [begin, end)."""
        head = self.head
        self.at = (begin, end)
        hidden, targets, tau, taus = self.rows.chunk(begin, end)
        self.logits = self.products.logits(hidden)
        stats = rows_forward(self.logits[None], targets, tau, taus, head.softcap, head.ignore_index, head.backend)
        if head.shards is not None:
            stats = head.shards.merge(stats, targets, tau, taus)
        for row, values in zip(self.norms, stats[2:]):
            row[begin:end] = values
        return stats[:2]

    def again(self, begin: int, end: int) -> None:
        """Back to rows whose statistics were taken before."""
        if self.at != (begin, end):
            self.at = (begin, end)
            self.logits = self.products.logits(self.rows.chunk(begin, end)[0])

    def gradients(self, entropy: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor) -> None:
        if not any(self.needs):
            return
        head, (begin, end) = self.head, self.at
        chunk = _, targets, tau, taus = self.rows.chunk(begin, end)
        gradient = self.products.gradient(end - begin)
        norms = self.norms[:, begin:end]
        stats = [x.float().contiguous() for x in (*norms, entropy, grad_logprobs, grad_entropy)]
        rows_backward(
            gradient[None], self.logits[None], targets, tau, taus, head.softcap, head.ignore_index, stats, head.backend
        )
        grad_hidden = None if self.grad_hidden is None else self.grad_hidden[begin:end]
        self.products.backward(gradient, chunk, grad_hidden, *stats[3:])

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return (self.grad_hidden, *self.products.gradients())

    def report(self) -> Report | None:
        """Of the active vocabulary, after `finish` and before the gradients are scaled."""
        return self.products.report(self.grad_hidden)


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, temperatures, head):
        rows = token_rows(hidden, targets, temperature, temperatures, head)
        stats = statistics(rows, head)
        ctx.save_for_backward(hidden, weight, bias, targets, temperatures, *stats)
        ctx.temperature, ctx.head = temperature, head
        logprobs, entropy = (rows.spread(x).view(targets.shape) for x in stats[:2])
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, _, _, targets, temperatures, *stats = ctx.saved_tensors
        rows = token_rows(hidden, targets, ctx.temperature, temperatures, ctx.head)
        a, b = (rows.gather(g.reshape(-1)) for g in (grad_logprobs, grad_entropy))
        grads, _ = statistics_backward(rows, ctx.head, stats, a, b, tuple(ctx.needs_input_grad[:3]))
        grad_hidden = None if grads[0] is None else rows.spread(grads[0]).view(hidden.shape)
        return grad_hidden, grads[1], grads[2], None, None, None, None


@arguments.not_compiled
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    vocab_starts: Sequence[int] | None = None,
    active_vocab: float | None = None,
    backend: str = "auto",
) -> TokenStats:
    """`token_stats` of softcap(logit_scale * (hidden @ weight.T + bias)), which never exists whole.

    Rows pass through one workspace of at most `workspace_bytes` (at least one row), whatever N. Forward costs one
    matrix product of the whole size; backward makes the logits again and adds one product each for `hidden` and
    `weight` (4 G in all, G = 2 N D V flop). A gradient that is not needed (a frozen head, say) costs neither memory
    nor product.

    Args:
        hidden: [..., D], float32, bfloat16 or float16.
        weight: [V, D], the same dtype. Its gradient gathers in float32.
        targets: [...], int64 or int32, in [0, V) or `ignore_index`. On the CPU ignored rows are dropped before the
            product; on a GPU their product is made but not read (a count of them would wait for the device).
        bias: [V], the same dtype, or None; -inf masks a word.
        logit_scale: a positive factor before softcap and temperature (Cohere; 1 / logits_scaling for Granite).
        logits_dtype: of the workspace. None: the dtype of `hidden`, as a model's own logits have it; torch.float32: not
            rounded (`mm` with `out_dtype` on a GPU).
        workspace_bytes: the bound, in bytes. None: 128 MiB on a GPU, 64 MiB on a CPU.
        process_group: of ranks that share the vocabulary: `weight` (and `bias`) are this rank's rows of it, in the
            order of the ranks; shards may differ in size. `hidden` and `targets` (ids of the whole vocabulary), like
            every other argument, are the same on all ranks, and all ranks make the same calls in the same order,
            backward included. Results are the same on all ranks, to the bit. The gradient of `hidden` is that of the
            whole vocabulary, on every rank; those of weight and bias are this shard's. One all_gather of 4 numbers a
            row; one all_reduce of the gradient of `hidden` a chunk. None, or a group of one: no shards.
        vocab_starts: the first word of each rank's shard and, last, V: k + 1 integers. Without it the ranks exchange
            their sizes and compare their arguments, at the start of each call (on a GPU that waits for the device).
        active_vocab: a probability such as 2**-12. Backward's products are then made of the columns that any row needs
            at that level, and a low-rank stand-in for the rest (active_vocab.py): faster and approximate. A GPU is
            waited for once a chunk. 0 is exact; None, exact and without the option's code. Not with `process_group`.
            The losses of this package return the share of columns kept and the error.
        temperature, softcap, ignore_index, backend: as for `token_stats`.

    Returns:
        TokenStats(logprobs, entropy), shaped like `targets`, float32; differentiable in hidden, weight and bias, once.

    Raises:
        ValueError: an argument is not as above. Of shards without `vocab_starts`, on all ranks if it is on one.

    Example:
        >>> out = linear_token_stats(hidden[:, :-1], model.lm_head.weight, ids[:, 1:])
        >>> loss = -out.logprobs.mean() - 0.01 * out.entropy.mean()
    """
    head, number, rows = check_head(
        hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, logits_dtype, workspace_bytes,
        backend, process_group, vocab_starts, active_vocab,
    )  # fmt: skip
    return TokenStats(*_LinearTokenStats.apply(hidden, weight, bias, targets, number, rows, head))
