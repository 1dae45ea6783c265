"""Gradients made while the logits are there, in forward, and a loss that carries them to backward.

A loss of (logprob, entropy) of each token needs the logits for nothing else, so autograd on these two vectors gives
dL/dlogprob and dL/dentropy of a chunk before the next chunk overwrites its logits: 3 G instead of 4 G.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.rows import rows_backward, rows_forward
from ..backends.types import RowGradients
from .active_vocab import Report
from .head import HeadParameters, TokenRows
from .products import Gradients, Products


class OneShot:
    """Statistics and gradients from one making of the logits: 3 G in all.

    Call `statistics(begin, end)`, decide dL/dlogprob and dL/dentropy of these rows, call `gradients` with
    them; chunk after chunk. `finish` gives the gradients. A chunk is at most head.rows_per_chunk rows. Where that
    takes the statistics of more rows, `again(begin, end)` makes the logits of an earlier chunk once more.
    """

    def __init__(self, rows: TokenRows, head: HeadParameters, needs: tuple[bool, bool, bool]):
        self.rows, self.head, self.needs = rows, head, needs
        self.products = Products(head, len(rows), needs)
        self.norms = torch.empty(2, len(rows), dtype=torch.float32, device=rows.hidden.device)
        """row_max and log_sum"""
        self.grad_hidden = torch.zeros_like(rows.hidden) if needs[0] else None

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
        chunk = self.rows.chunk(begin, end)
        gradient = self.products.gradient(end - begin)
        given = (entropy, *self.norms[:, begin:end], grad_logprobs, grad_entropy)
        vectors = RowGradients(*(x.float().contiguous() for x in given))
        rows_backward(gradient[None], self.logits[None], chunk.targets, chunk.options, vectors)
        grad_hidden = None if self.grad_hidden is None else self.grad_hidden[begin:end]
        self.products.backward(gradient, chunk, grad_hidden, vectors.grad_logprobs, vectors.grad_entropy)

    def finish(self) -> Gradients:
        return (self.grad_hidden, *self.products.gradients())

    def report(self) -> Report | None:
        """Of the active vocabulary, after `finish` and before the gradients are scaled."""
        return self.products.report(self.grad_hidden)


class _Precomputed(torch.autograd.Function):
    """A loss whose gradients were made with it. Backward multiplies them, in place, by the scalar that comes."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, loss, gradients):
        ctx.gradients = gradients
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a fused linear loss are used up by its first backward; call it again")
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if g is None else _scale(g, upstream) for g in gradients), None, None)


def _scale(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient *= upstream, multiplied in float32: a loss scale of 2^16 does not exist in float16."""
    if upstream.device.type == "cpu" and float(upstream) == 1.0:
        return gradient
    if gradient.dtype == torch.float32:
        return gradient.mul_(upstream)
    # Of shape [1], not a scalar: it then takes part in type promotion. In parts, for the CPU makes float32 copies.
    for part in gradient.split(max(1, (1 << 22) * gradient.shape[0] // max(1, gradient.numel()))):
        part.mul_(upstream.reshape(1))
    return gradient


def needs_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    on = torch.is_grad_enabled()
    return on and hidden.requires_grad, on and weight.requires_grad, on and bias is not None and bias.requires_grad


def reported(report: Report | None) -> dict[str, Any]:
    """As the fields of the output types."""
    if report is None:
        return {}
    return {
        "active_share": report.share,
        "active_error": report.hidden_error,
        "active_weight_error": report.weight_error,
    }


def attach(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, loss: Tensor, rows: TokenRows, gradients: Gradients
) -> Tensor:
    grad_hidden = gradients[0]
    if grad_hidden is not None:
        grad_hidden = rows.spread(grad_hidden).view(hidden.shape)
    return _Precomputed.apply(hidden, weight, bias, loss, (grad_hidden, *gradients[1:]))
