"""The head's matrix products, a chunk of rows at a time, and the statistics and gradients made of them.

Rows go through the library's matrix product, a chunk at a time, into one workspace of at most `workspace_bytes`; the
row kernels work on it in place. With G = 2 N D V flop: statistics 1 G; their backward, which makes the logits again,
3 G more (`linear_token_stats`: two phase, 4 G); a loss whose gradient is known chunk by chunk 3 G (one_shot.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..backends.rows import rows_backward, rows_forward
from ..backends.types import RowGradients, RowStats
from . import vocab_parallel
from .active_vocab import ActiveProducts, Report
from .head import Chunk, HeadParameters, TokenRows

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of hidden, weight and bias; None where it is not needed."""

# A CPU's product of fewer rows adds its V terms one after the other: an error of 3e-5, where slices have 3e-7.
FEW_ROWS = 4
FEW_ROWS_SLICE = 512


class Products:
    """The head's four products of one chunk: logits, and the gradients of hidden, weight and bias.

    Gradients of weight and bias gather in float32 over all chunks. A gradient that nobody needs costs neither memory
    nor a product. Temporaries stay under the workspace: what must be converted is, a slice of the vocabulary at a time.
    """

    def __init__(self, head: HeadParameters, n_rows: int, needs: tuple[bool, bool, bool]):
        self.head = head
        self.V, self.D = head.weight.shape
        self.needs_hidden, self.needs_weight, self.needs_bias = needs
        device = head.weight.device
        n_rows = min(n_rows, head.rows_per_chunk)
        self.workspace = torch.empty(n_rows, self.V, dtype=head.logits_dtype, device=device)
        self.gradient_workspace = self.workspace
        if any(needs) and head.gradient_dtype != head.logits_dtype:
            self.gradient_workspace = torch.empty(n_rows, self.V, dtype=head.gradient_dtype, device=device)

        # Tensors where they are needed, else None.
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.grad_weight: Any = zeros(self.V, self.D) if self.needs_weight else None
        self.grad_bias: Any = zeros(self.V) if self.needs_bias else None
        self.slice = max(1, min(self.V, head.workspace_bytes // (4 * max(self.D, n_rows))))
        self.reduction = None if head.shards is None else vocab_parallel.Reduction(head.shards)
        self.active = None
        if head.active_vocab is not None and (self.needs_hidden or self.needs_weight):
            self.active = ActiveProducts(head.weight, n_rows, head.active_vocab, needs[:2], head.workspace_bytes)

    def _slices(self) -> Iterator[tuple[int, int]]:
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

    def backward(self, gradient: Tensor, chunk: Chunk, grad_hidden: Any, a: Tensor, b: Tensor) -> None:
        """dL/dlogits [n, V]: adds to grad_weight and grad_bias, writes grad_hidden [n, D].

        a = dL/dlogprob, b = dL/dentropy.
        """
        hidden, targets, options = chunk
        done = False
        if self.active is not None:
            weights = (a.abs() + b.abs()) / options.tau
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
            total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
            for v in range(0, self.V, FEW_ROWS_SLICE):
                total += gradient[:, v : v + FEW_ROWS_SLICE].float() @ weight[v : v + FEW_ROWS_SLICE].float()
        elif gradient.dtype == weight.dtype and (self.reduction is None or weight.dtype == torch.float32):
            torch.mm(gradient, weight, out=out)
        elif gradient.is_cuda:
            total = torch.mm(gradient, weight, out_dtype=torch.float32)
        else:
            total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
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
        weight, bias = (None if g is None else g.to(dtype) for g in (self.grad_weight, self.grad_bias))
        return weight, bias


def statistics(rows: TokenRows, head: HeadParameters) -> RowStats:
    """Of the whole rows, [len(rows)]; 1 G."""
    out = torch.zeros(4, len(rows), dtype=torch.float32, device=rows.hidden.device)
    products = Products(head, len(rows), (False, False, False))
    for begin in range(0, len(rows), head.rows_per_chunk):
        end = min(begin + head.rows_per_chunk, len(rows))
        hidden, targets, options = rows.chunk(begin, end)
        stats = rows_forward(products.logits(hidden)[None], targets, options)
        for row, values in zip(out, stats):
            row[begin:end] = values
    if head.shards is not None:
        bounds = (head.workspace_bytes, head.rows_per_chunk)
        head.shards.merge_all(out, rows.targets, rows.options, *bounds)
    return RowStats(*out)


def statistics_backward(
    rows: TokenRows, head: HeadParameters, vectors: RowGradients, needs: tuple[bool, bool, bool]
) -> tuple[Gradients, Report | None]:
    """(dL/dhidden, dL/dweight, dL/dbias), None where not needed; and the report of the active vocabulary, or None.

    The logits are made again, so 1 G + up to 2 G.
    """
    products = Products(head, len(rows), needs)
    grad_hidden = torch.empty_like(rows.hidden) if needs[0] else None
    for begin in range(0, len(rows), head.rows_per_chunk):
        end = min(begin + head.rows_per_chunk, len(rows))
        chunk = rows.chunk(begin, end)
        logits, gradient = products.logits(chunk.hidden), products.gradient(end - begin)
        part = RowGradients(*(x[begin:end].contiguous() for x in vectors))
        rows_backward(gradient[None], logits[None], chunk.targets, chunk.options, part)
        into = None if grad_hidden is None else grad_hidden[begin:end]
        products.backward(gradient, chunk, into, part.grad_logprobs, part.grad_entropy)
    gradients = (grad_hidden, *products.gradients())
    return gradients, products.report(grad_hidden)
