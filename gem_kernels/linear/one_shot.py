"""Gradients made while the logits are there, in forward, and a loss that carries them to backward.

A loss of (logprob, entropy) of each token needs the logits for nothing else, so autograd on these two vectors gives
dL/dlogprob and dL/dentropy of a chunk before the next chunk overwrites its logits: 3 products instead of 4.

Where a row's weight comes later and only the hidden states need a gradient, dHidden is made with weight 1 while the
logits are there, kept in float32, and multiplied by the weight when that is known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..backends.rows import rows_backward, rows_forward
from ..backends.types import RowGradients
from .active_vocab import Report
from .head import HeadParameters, TokenRows
from .products import Gradients, Products, held_dtype, row_weights


class OneShot:
    """Statistics and gradients from one making of the logits: 3 products in all, 2 where the head is frozen.

    Call `statistics(begin, end)`, decide dL/dlogprob and dL/dentropy of these rows, call `gradients` with
    them; chunk after chunk. `finish` gives the gradients. A chunk is at most head.rows_per_chunk rows. Where that
    takes the statistics of more rows, `again(begin, end)` makes the logits of an earlier chunk once more; or, where
    `weighs_later`, `unit_gradients` follows each `statistics`, and `weigh` ends them.
    """

    def __init__(self, rows: TokenRows, head: HeadParameters, needs: tuple[bool, bool, bool]):
        self.rows, self.head, self.needs = rows, head, needs
        self.products = Products(head, len(rows), needs, held=True)
        self.norms = torch.empty(2, len(rows), dtype=torch.float32, device=rows.hidden.device)
        """row_max and log_sum"""
        self.logits: Any = None
        self.grad_hidden: Any = None
        if needs[0]:
            dtype = held_dtype(rows.hidden.dtype)
            self.grad_hidden = torch.empty(rows.hidden.shape, dtype=dtype, device=rows.hidden.device)
        self.unit: Any = None
        """dHidden of rows [unit_begin, ...) with weight 1, float32."""

    @property
    def weighs_later(self) -> bool:
        """Not with `active_vocab`: which columns matter depends on the rows' weights."""
        return self.needs == (True, False, False) and self.head.active_vocab is None

    def statistics(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """logprobs, entropy of rows [begin, end)."""
        self.at = (begin, end)
        hidden, targets, options = self.rows.chunk(begin, end)
        self.logits = self.products.logits(hidden)
        stats = rows_forward(self.logits[None], targets, options)
        if self.head.shards is not None:
            stats = self.head.shards.merge(stats, targets, options)
        self.norms[0, begin:end], self.norms[1, begin:end] = stats.row_max, stats.log_sum
        return stats.logprobs, stats.entropy

    def again(self, begin: int, end: int) -> None:
        """Back to rows whose statistics were taken before."""
        if self.at != (begin, end):
            self.at = (begin, end)
            self.logits = self.products.logits(self.rows.chunk(begin, end)[0])

    def gradients(self, entropy: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor) -> None:
        if not any(self.needs):
            return
        begin, end = self.at
        into = None if self.grad_hidden is None else self.grad_hidden[begin:end]
        self._gradients(into, entropy, grad_logprobs, grad_entropy)

    def _gradients(self, into: Any, entropy: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor) -> None:
        begin, end = self.at
        chunk = self.rows.chunk(begin, end)
        gradient = self.products.gradient(end - begin)
        weights, unscale = row_weights(grad_logprobs, grad_entropy, chunk.options.tau), None
        if gradient.dtype == torch.float16:
            scale, unscale = _powers_of_two(weights)
            weights, grad_logprobs, grad_entropy = (x * scale for x in (weights, grad_logprobs, grad_entropy))
        given = (entropy, *self.norms[:, begin:end], grad_logprobs, grad_entropy)
        vectors = RowGradients(*(x.float().contiguous() for x in given))
        rows_backward(gradient[None], self.logits[None], chunk.targets, chunk.options, vectors)
        self.products.backward(gradient, chunk, into, weights, unscale)

    def unit_gradients(self, begin: int, end: int, entropy: Tensor) -> None:
        """dHidden of the rows of the last `statistics`, among rows [begin, end) that `weigh` takes together."""
        if self.unit is None:
            self.unit, self.unit_begin = self.grad_hidden[begin:end], begin
            if self.unit.dtype != torch.float32:
                self.unit = torch.empty(self.unit.shape, dtype=torch.float32, device=self.unit.device)
        first, last = (x - self.unit_begin for x in self.at)
        ones = torch.ones_like(entropy)
        self._gradients(self.unit[first:last], entropy, ones, torch.zeros_like(ones))

    def weigh(self, grad_logprobs: Tensor) -> None:
        """Ends the rows of `unit_gradients`, by their dL/dlogprob. A row of weight 0 is 0, were it NaN before."""
        self.products.end_reduction()
        begin, weights = self.unit_begin, grad_logprobs[:, None]
        self.unit.mul_(weights).masked_fill_(weights == 0, 0.0)
        if self.unit.dtype != self.grad_hidden.dtype:
            self.grad_hidden[begin : begin + len(weights)] = self.unit
        self.unit = None

    def finish(self) -> Gradients:
        self.logits = None
        return (self.grad_hidden, *self.products.gradients())

    def report(self) -> Report | None:
        """Of the active vocabulary, after `finish` and before the gradients are scaled."""
        return self.products.report(self.grad_hidden)


def _powers_of_two(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(x, 1 / x), scalars: with rows of weight `weights` * x the largest entries of dL/dlogits are about 1, so that
    float16 holds them whatever the loss is divided by."""
    top = weights.abs().amax() if weights.numel() else weights.new_ones(())
    exponent = torch.where((top > 0) & top.isfinite(), top.log2().ceil(), 0.0).clamp(-100, 100)
    return torch.exp2(-exponent), torch.exp2(exponent)


class _Precomputed(torch.autograd.Function):
    """A loss whose gradients were made with it. Backward multiplies them, in place, by the scalar that comes."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, loss, gradients):
        ctx.gradients = gradients
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a fused linear loss are used up by its first backward; call it again")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (None if g is None else _scale(g, upstream).to(dtype) for g, dtype in zip(gradients, ctx.dtypes))
        return (*scaled, None, None)


def _scale(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient *= upstream, multiplied in float32: a loss scale of 2^16 does not exist in float16."""
    if upstream.device.type == "cpu" and float(upstream) == 1.0:
        return gradient
    if gradient.dtype == torch.float32:
        return gradient.mul_(upstream)
    # Of shape [1], not a scalar: it then takes part in type promotion. In parts on a CPU, which makes float32 copies.
    rows = (
        gradient.shape[0] if arguments.on_gpu(gradient) else (1 << 22) * gradient.shape[0] // max(1, gradient.numel())
    )
    for part in gradient.split(max(1, rows)):
        part.mul_(upstream.reshape(1))
    return gradient


def needs_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    """Which of them need a gradient. They may not be checked yet."""
    on = torch.is_grad_enabled()
    needs = (on and isinstance(x, Tensor) and x.requires_grad for x in (hidden, weight, bias))
    return next(needs), next(needs), next(needs)


def reported(report: Report | None) -> dict[str, Any]:
    """As the fields of the output types."""
    if report is None:
        return {}
    return {
        "active_share": report.share,
        "active_error": report.hidden_error,
        "active_weight_error": report.weight_error,
    }


def spread(gradients: Gradients, hidden: Tensor, rows: TokenRows) -> Gradients:
    """With dHidden shaped like `hidden`, zeros where a row was dropped."""
    grad_hidden = gradients[0]
    if grad_hidden is not None:
        grad_hidden = rows.spread(grad_hidden).view(hidden.shape)
    return (grad_hidden, *gradients[1:])


def attach(hidden: Tensor, weight: Tensor, bias: Tensor | None, loss: Tensor, gradients: Gradients) -> Tensor:
    """The loss, whose backward gives these gradients times the upstream scalar."""
    return _Precomputed.apply(hidden, weight, bias, loss, gradients)
