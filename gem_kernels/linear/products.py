"""The head's matrix products, a chunk of rows at a time, and the statistics and gradients made of them.

Rows go through the library's matrix product, a chunk at a time, into one workspace of at most `workspace_bytes`; the
row kernels work on it in place. A product is 2 N D V flop. Statistics take 1 product; their backward, which makes the
logits again, 3 more (`linear_token_stats`: two phase, 4 products); a loss whose gradient is known chunk by chunk takes
3 products (one_shot.py), 2 where the head is frozen.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import arguments, vocab_parallel
from ..backends.rows import rows_backward, rows_forward
from ..backends.types import RowGradients, RowStats
from .active_vocab import ActiveProducts, Report
from .head import Chunk, HeadParameters, TokenRows

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of hidden, weight and bias; None where it is not needed."""

# A CPU's product of fewer rows adds its V terms one after the other: an error of 3e-5, where slices have 3e-7.
FEW_ROWS = 4
FEW_ROWS_SLICE = 512


@functools.cache
def adds_in_product() -> bool:
    """Whether torch.addmm adds a product of 16-bit operands to a float32 tensor on a GPU. From torch 2.10 on (pull
    request 167931): before, `self` had to be of 16 bits, or was not read."""
    return torch.__version__ >= "2.10"


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a gradient made before the upstream scalar is known. A loss scaler's scale exists to keep small numbers above
    float16's smallest, so float16 is rounded to only after it."""
    return torch.float32 if dtype == torch.float16 else dtype


def _without_autocast(method):
    """Autocast would make 16-bit products of the float32 ones, in silence."""

    @functools.wraps(method)
    def run(self, *args):
        kind = self.head.weight.device.type
        if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
            return method(self, *args)
        with torch.autocast(kind, enabled=False):
            return method(self, *args)

    return run


class Products:
    """The head's four products of one chunk: logits, and the gradients of hidden, weight and bias.

    Gradients of weight and bias gather in float32 over all chunks; where all rows are one chunk, that of weight is
    written once, in its own dtype. A gradient that nobody needs costs neither memory nor a product. Temporaries stay
    under the workspace: what must be converted is, a slice of the vocabulary at a time; a weight that is not of
    `compute_dtype` whole, once, where the copy is no larger than the workspace. held: the gradients of weight and bias
    wait for an upstream scalar (`held_dtype`).
    """

    def __init__(self, head: HeadParameters, n_rows: int, needs: tuple[bool, bool, bool], held: bool = False):
        self.head, self.weight = head, head.weight
        self.bias = None if head.bias is None else head.bias.to(head.compute_dtype)
        if self.weight.numel() * head.compute_dtype.itemsize <= head.workspace_bytes:
            self.weight = self.weight.to(head.compute_dtype)
        self.converts = self.weight.dtype != head.compute_dtype
        """A slice at a time, for each product."""
        self.V, self.D = head.weight.shape
        self.needs_hidden, self.needs_weight, self.needs_bias = needs
        device, one_chunk = head.weight.device, n_rows <= head.rows_per_chunk
        n_rows = min(n_rows, head.rows_per_chunk)
        self.workspace: Any = head.workspace(n_rows, head.logits_dtype)
        self.gradient_workspace: Any = self.workspace
        if any(needs) and head.gradient_dtype != head.logits_dtype:
            self.gradient_workspace = head.workspace(n_rows, head.gradient_dtype)
        dtypes = (x.dtype for x in (head.weight, head.weight if head.bias is None else head.bias))
        self.weight_dtype, self.bias_dtype = (held_dtype(x) if held else x for x in dtypes)
        self.grad_bias: Any = torch.zeros(self.V, dtype=torch.float32, device=device) if self.needs_bias else None
        bytes_per_number = 8 if self.converts else 4
        self.slice = max(1, min(self.V, head.workspace_bytes // (bytes_per_number * max(self.D, n_rows))))
        self.reduction = None
        if head.shards is not None and head.shards.reduces_hidden:
            self.reduction = vocab_parallel.Reduction(head.shards)
        self.active = None
        if head.active_vocab is not None and (self.needs_hidden or self.needs_weight):
            more = (head.workspace_bytes, head.compute_dtype)
            self.active = ActiveProducts(self.weight, n_rows, head.active_vocab, needs[:2], *more)
        self.grad_weight: Any = None
        """[V, D] where it is needed. The first chunk writes it, the others add."""
        self.written = n_rows == 0 or self.active is not None
        if self.needs_weight:
            make = torch.zeros if self.written else torch.empty
            dtype = self.weight_dtype
            # A GPU's product gives the dtype of its operands, or float32.
            made = not arguments.on_gpu(head.weight) or dtype in (head.gradient_dtype, torch.float32)
            if not (one_chunk and made) or self.written:
                dtype = torch.float32
            self.grad_weight = make(self.V, self.D, dtype=dtype, device=device)

    def _slices(self) -> Iterator[tuple[int, int]]:
        return ((v, min(v + self.slice, self.V)) for v in range(0, self.V, self.slice))

    def _words(self, v: int, w: int) -> Tensor:
        """Rows [v, w) of the weight, in the dtype of the products."""
        return self.weight[v:w].to(self.head.compute_dtype)

    @_without_autocast
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, V], in the workspace."""
        head, out = self.head, self.workspace[: hidden.shape[0]]
        gpu, same = arguments.on_gpu(hidden), hidden.dtype == head.logits_dtype
        more: Any = {} if same or not gpu else {"out_dtype": head.logits_dtype}
        if not self.converts and (same or gpu):
            torch.mm(hidden, self.weight.t(), out=out, **more)
        else:
            hidden = hidden if gpu else hidden.to(head.logits_dtype)
            for v, w in self._slices():
                torch.mm(hidden, self._words(v, w).to(hidden.dtype).t(), out=out[:, v:w], **more)
        return out if self.bias is None else out.add_(self.bias)

    def gradient(self, rows: int) -> Tensor:
        """Where dL/dlogits of a chunk is written: over its logits, unless the products want another dtype."""
        return self.gradient_workspace[:rows]

    @_without_autocast
    def backward(self, gradient: Tensor, chunk: Chunk, grad_hidden: Any, weights: Tensor, unscale: Any = None) -> None:
        """dL/dlogits [n, V]: adds to grad_weight and grad_bias, writes grad_hidden [n, D].

        weights: what the rows weigh, `row_weights`. unscale: a scalar tensor that the three are multiplied by first, in
        float32; then grad_hidden and grad_weight are float32.
        """
        hidden, targets, _ = chunk
        done = False
        if self.active is not None:
            done = self.active.backward(gradient, hidden, grad_hidden, self.grad_weight, targets, weights, unscale)
        if self.needs_hidden and not done:
            self._hidden(gradient, grad_hidden, unscale)
        if self.needs_weight and not done:
            self._weight(gradient, hidden, unscale)
        if self.needs_bias:
            total = gradient.sum(0, dtype=torch.float32)
            self.grad_bias += total if unscale is None else total * unscale

    def _hidden(self, gradient: Tensor, out: Tensor, unscale: Any) -> None:
        weight, total, gpu = self.weight, out, arguments.on_gpu(gradient)
        dtypes = {gradient.dtype, self.head.compute_dtype, out.dtype}
        if not gpu and gradient.shape[0] < FEW_ROWS:
            total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
            for v in range(0, self.V, FEW_ROWS_SLICE):
                w = v + FEW_ROWS_SLICE
                total += gradient[:, v:w].float() @ self._words(v, w).float()
        elif not self.converts and len(dtypes) == 1 and (self.reduction is None or out.dtype == torch.float32):
            torch.mm(gradient, weight, out=out)
        elif not self.converts and gpu and out.dtype == torch.float32:
            torch.mm(gradient, weight, out_dtype=torch.float32, out=out)
        elif not self.converts and gpu:
            total = torch.mm(gradient, weight, out_dtype=torch.float32)
        else:
            total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
            for v, w in self._slices():
                if gpu:
                    total += torch.mm(gradient[:, v:w], self._words(v, w), out_dtype=torch.float32)
                else:
                    total.addmm_(gradient[:, v:w].float(), self._words(v, w).float())
        if unscale is not None:
            total *= unscale
        if self.reduction is not None:
            self.reduction.start(total, out)
        elif total is not out:
            out.copy_(total)

    def _weight(self, gradient: Tensor, hidden: Tensor, unscale: Any) -> None:
        total, first, self.written = self.grad_weight, not self.written, True
        gpu, narrow = arguments.on_gpu(gradient), gradient.dtype != torch.float32
        if not gpu:
            hidden = hidden.float()
        if not narrow and total.dtype == torch.float32:
            if first:
                torch.mm(gradient.t(), hidden, out=total)
            else:
                total.addmm_(gradient.t(), hidden)
        elif gpu and first:
            more: Any = {} if total.dtype == gradient.dtype else {"out_dtype": total.dtype}
            torch.mm(gradient.t(), hidden, out=total, **more)
            if unscale is not None:
                total *= unscale
        elif gpu and unscale is None and adds_in_product() and min(self.V, self.D) > 1:
            torch.addmm(total, gradient.t(), hidden, out_dtype=torch.float32, out=total)
        else:
            for v, w in self._slices():
                self._weight_slice(total[v:w], gradient[:, v:w].t(), hidden, first, unscale)

    def _weight_slice(self, total: Tensor, gradient: Tensor, hidden: Tensor, first: bool, unscale: Any) -> None:
        """total [m, D] = or += gradient [m, n] @ hidden [n, D], of 16-bit gradients, made in float32."""
        if arguments.on_gpu(gradient):
            part = torch.mm(gradient, hidden, out_dtype=torch.float32)
        elif first or unscale is not None:
            part = torch.mm(gradient.float(), hidden)
        else:
            total.addmm_(gradient.float(), hidden)
            return
        if first:
            total.copy_(part if unscale is None else part.mul_(unscale))
        elif unscale is None:
            total += part
        else:
            total.addcmul_(part, unscale)

    def end_reduction(self) -> None:
        """Until here the last grad_hidden may be on its way."""
        if self.reduction is not None:
            self.reduction.finish()

    @_without_autocast
    def report(self, grad_hidden: Tensor | None) -> Report | None:
        """Of the active vocabulary, after the last chunk; None without one."""
        if self.active is None:
            return None
        self.active.add_pending(self.grad_weight)
        return self.active.report(grad_hidden, self.grad_weight)

    @_without_autocast
    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """grad_weight and grad_bias in their own dtype. The end: the workspace is let go before they are converted."""
        self.end_reduction()
        self.workspace = self.gradient_workspace = None
        if self.active is not None:
            self.active.add_pending(self.grad_weight)
        weight = None if self.grad_weight is None else self.grad_weight.to(self.weight_dtype)
        return weight, None if self.grad_bias is None else self.grad_bias.to(self.bias_dtype)


def row_weights(a: Tensor, b: Tensor, tau: float | Tensor) -> Tensor:
    """What a row's gradient is at most, but for the entropy's logarithm: a = dL/dlogprob, b = dL/dentropy."""
    return (a.abs() + b.abs()) / tau


def statistics(rows: TokenRows, head: HeadParameters) -> RowStats:
    """Of the whole rows, [len(rows)]; 1 product."""
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
    rows: TokenRows,
    head: HeadParameters,
    vectors: RowGradients,
    needs: tuple[bool, bool, bool],
) -> tuple[Gradients, Report | None]:
    """(dL/dhidden, dL/dweight, dL/dbias), None where not needed; and the report of the active vocabulary, or None.

    The logits are made again: 1 product, and one for each gradient of hidden and weight.
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
        products.backward(gradient, chunk, into, row_weights(part.grad_logprobs, part.grad_entropy, chunk.options.tau))
        del logits, gradient
    gradients = (grad_hidden, *products.gradients())
    return gradients, products.report(grad_hidden)
