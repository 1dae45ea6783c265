"""The head's two backward products on the columns of the vocabulary that matter, and a low-rank stand-in for the rest.

After softmax most columns of a chunk's gradient G = dL/dlogits [n, V] are negligible, but spread thinly: dropped
together they are worth percents. So the columns are split. Of the active ones, gathered, the products are exact; the
others, G_d, are projected onto a subspace of the rows, with an orthonormal basis Q [n, RANK]:

    active:  sqrt(sum_r G_rv^2) > threshold * max_r (|a_r| + |b_r|) / tau_r,  or v a target of the chunk
    G_d  ~=  Q (Q^T G_d),    Q an orthonormal basis of G_d [1, W R],  R [D, RANK - 1]
    dHidden = G_a W_a + Q (Q^T G_d W)            dWeight_a = G_a^T H,   dWeight_d = (Q^T G_d)^T (Q^T H)

with a = dL/dlogprob, b = dL/dentropy. For a column that one row of full weight wants, the rule reads p > threshold;
rows without weight ask for nothing. The basis holds G_d 1, the mass each row has dropped, so the sum of every row of G
is kept, and RANK = 1 would be the mean dropped embedding, fitted by least squares to rows of either sign. The other
directions are the range finder of a randomized SVD of the tail G_d W (Halko, Martinsson, Tropp 2011, Algorithm 4.1):
what rows drop differs smoothly from row to row, so a few directions hold most of it. R is random in the first chunk;
after chunks 1, 2, 4, 8, ... it is the directions that the tail had there, a step of the power iteration for nothing.

The error is measured in the same pass, over all rows and columns and not a sample of them: for random signs
S [n, PROBES], E |S^T X|^2 = PROBES |X|^2, where X is what the projection leaves out. Rounding is not in it.

Cost: three passes over G (norms, two thin products), one over W, and share * 2 head products. How many columns are
active is data, so a GPU is waited for once a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments

RANK = 16
"""Directions of the tail."""
PROBES = 8
"""Random vectors that measure the error, for each of the two gradients."""
DENSE_SHARE = 0.6
"""A chunk with more than this share of active columns is done whole: nearly as fast, and exact."""
NORM_ROWS = 16
"""Rows squared at a time on a CPU: they stay in the cache."""


class Report(NamedTuple):
    share: Tensor
    """Of the columns, kept; the mean over rows."""
    hidden_error: Tensor | None
    """Relative L2 error of dHidden, measured; None where it is not needed."""
    weight_error: Tensor | None


def check_threshold(active_vocab: Any, sharded: bool) -> float | None:
    if active_vocab is None:
        return None
    if isinstance(active_vocab, bool) or not isinstance(active_vocab, (int, float)) or not 0 <= active_vocab < 1:
        arguments.fail("active_vocab", "None or a probability, 0 <= active_vocab < 1", repr(active_vocab))
    if sharded:
        arguments.fail("active_vocab", "None with a vocabulary in shards (`vocab_parallel`)", repr(active_vocab))
    return float(active_vocab)


def column_norms(gradient: Tensor) -> Tensor:
    """[n, V] -> sqrt(sum_r G_rv^2) [V], float32."""
    if arguments.on_gpu(gradient):
        return torch.linalg.vector_norm(gradient, dim=0, dtype=torch.float32)
    # vector_norm(dim=0) walks down the columns: 40 % of the dense products' time (2 cores, n = 2,048, V = 49,152).
    total = torch.zeros(gradient.shape[1], dtype=torch.float32, device=gradient.device)
    squares = torch.empty(NORM_ROWS, gradient.shape[1], dtype=torch.float32, device=gradient.device)
    for rows in gradient.split(NORM_ROWS):
        total += torch.square(rows.float(), out=squares[: rows.shape[0]]).sum(0)
    return total.sqrt_()


def active_columns(gradient: Tensor, targets: Tensor, weights: Tensor, threshold: float) -> Tensor | None:
    """Indices, ascending; None where a number is not finite. weights: (|a| + |b|) / tau, [n]."""
    counted = (targets >= 0) & (targets < gradient.shape[1])
    norms = column_norms(gradient)
    active = norms > threshold * torch.where(counted, weights, 0.0).amax()
    active[targets[counted]] = True
    return active.nonzero()[:, 0] if bool(norms.isfinite().all()) else None


def _mm(x: Tensor, y: Tensor) -> Tensor:
    """float32, however the operands are kept; a GPU multiplies them in the narrower dtype."""
    narrow = x if x.dtype.itemsize <= y.dtype.itemsize else y
    if arguments.on_gpu(narrow) and narrow.dtype != torch.float32:
        return torch.mm(x.to(narrow.dtype), y.to(narrow.dtype), out_dtype=torch.float32)
    return torch.mm(x.float(), y.float())


class ActiveProducts:
    """Of one call: dHidden and dWeight of its chunks, and the report. What each chunk adds is `backward`."""

    def __init__(
        self,
        weight: Tensor,
        n_rows: int,
        threshold: float,
        needs: tuple[bool, bool],
        workspace_bytes: int,
        dtype: torch.dtype,
    ):
        """dtype: what the weight is rounded to before a product."""
        self.weight, self.threshold, self.workspace_bytes, self.dtype = weight, threshold, workspace_bytes, dtype
        self.needs_hidden, self.needs_weight = needs
        (V, D), device = weight.shape, weight.device
        # A generator of its own: results repeat, and the caller's random state is left alone.
        generator = torch.Generator("cpu").manual_seed(0)
        random = torch.randn(D, RANK, generator=generator, dtype=torch.float32, device="cpu")
        self.directions: Tensor | None = random.to(device)
        """New ones; None where the sketch of the last chunk serves on. The first gives way to the ones."""
        self.chunks = 0
        self.row_signs = _signs(n_rows, generator).to(device)
        self.hidden_signs = _signs(D, generator).to(device)
        self.rows = self.kept = 0
        self.hidden_error = torch.zeros((), dtype=torch.float32, device=device)
        self.weight_error: Any = (
            torch.zeros(PROBES, V, dtype=torch.float32, device=device) if self.needs_weight else None
        )
        self.pending: list[tuple[Tensor, Tensor]] = []
        """Factors of dWeight's tail, not added yet: adding them costs a pass over all of dWeight."""
        self.most_pending = max(1, workspace_bytes // (16 * RANK * V))

    def backward(
        self,
        gradient: Tensor,
        hidden: Tensor,
        grad_hidden: Any,
        grad_weight: Any,
        targets: Tensor,
        weights: Tensor,
        unscale: Any = None,
    ) -> bool:
        """As `Products.backward`. False where the chunk is better done whole; then nothing is written."""
        n, V = gradient.shape
        index = active_columns(gradient, targets, weights, self.threshold) if self.threshold > 0 else None
        self.rows += n
        if index is None or len(index) > DENSE_SHARE * V:
            self.kept += n * V
            return False
        self.kept += n * len(index)
        self.unscale = unscale
        hidden = hidden if arguments.on_gpu(hidden) else hidden.float()
        total: Any = None
        if self.needs_hidden:
            total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        self._active(gradient, hidden, index, total, grad_weight)
        self._tail(gradient, hidden, index, total, grad_weight)
        if self.needs_hidden:
            grad_hidden.copy_(self._unscaled(total))
        return True

    def _unscaled(self, x: Tensor) -> Tensor:
        """What is linear in the gradient, as if that had not been scaled. In place."""
        return x if self.unscale is None else x.mul_(self.unscale)

    def _active(self, gradient: Tensor, hidden: Tensor, index: Tensor, total: Any, grad_weight: Any) -> None:
        n, D = hidden.shape
        for part in index.split(max(1, self.workspace_bytes // (8 * max(n, D)))):
            columns = gradient.index_select(1, part)
            if self.needs_hidden:
                total += _mm(columns, self.weight[part].to(self.dtype))
            if self.needs_weight:
                grad_weight.index_add_(0, part, self._unscaled(_mm(columns.t(), hidden)))

    def _tail(self, gradient: Tensor, hidden: Tensor, index: Tensor, total: Any, grad_weight: Any) -> None:
        if self.directions is not None:
            self.sketch = self._to_words(self.directions.t(), self.weight.t(), self.dtype)
            self.sketch[0], self.directions = 1.0, None
        basis = torch.linalg.qr(self._over_words(gradient, self.sketch.index_fill(1, index, 0.0).t()))[0]
        n, k = basis.shape
        signs = self.row_signs[:n]
        probes = _mm(hidden, self.hidden_signs)
        # [k + 2 PROBES, V]: the projection, and the probes of dHidden and dWeight.
        dropped = self._to_words(torch.cat([basis, signs, probes], 1).t(), gradient).index_fill_(1, index, 0.0)
        projected = dropped[:k]
        self.chunks += 1
        if self.needs_hidden:
            embedded = self._over_words(dropped[: k + PROBES], self.weight, self.dtype)
            total.addmm_(basis, embedded[:k])
            left_out = torch.addmm(embedded[k:], signs.t() @ basis, embedded[:k], alpha=-1)
            self.hidden_error += self._unscaled(left_out).square().sum() / PROBES
            if self.chunks.bit_count() == 1 and k == RANK <= hidden.shape[1]:
                self.directions = torch.linalg.qr(embedded[:k].t())[0].roll(1, 1)
        if self.needs_weight:
            left_out = torch.addmm(dropped[k + PROBES :], probes.t() @ basis, projected, alpha=-1)
            self.weight_error += self._unscaled(left_out)
            self.pending.append((self._unscaled(projected.clone()), _mm(basis.t(), hidden)))
            if len(self.pending) == self.most_pending:
                self.add_pending(grad_weight)

    def add_pending(self, grad_weight: Any) -> None:
        if self.pending:
            left, right = zip(*self.pending)
            grad_weight.addmm_(torch.cat(left).t(), torch.cat(right))
            self.pending.clear()

    def report(self, grad_hidden: Any, grad_weight: Any) -> Report:
        """Of the finished gradients, before anything scales them."""
        share = self.kept / max(1, self.rows * self.weight.shape[0])
        of_hidden = of_weight = None
        if self.needs_hidden:
            of_hidden = _ratio(self.hidden_error.sqrt(), grad_hidden)
        if self.needs_weight:
            of_weight = _ratio(torch.linalg.vector_norm(self.weight_error) / PROBES**0.5, grad_weight)
        device = self.weight.device
        return Report(torch.tensor(share, dtype=torch.float32, device=device), of_hidden, of_weight)

    # Products in float32. What must be converted first is, a slice of the vocabulary at a time. dtype: of y, to start.

    def _to_words(self, x: Tensor, y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[few, m] @ [m, V]."""
        dtype = dtype or y.dtype
        if dtype == y.dtype and (arguments.on_gpu(y) or y.dtype == torch.float32):
            return _mm(x, y)
        return torch.cat([_mm(x, part.to(dtype)) for part in y.split(self._slice(y.shape[0]), 1)], 1)

    def _over_words(self, x: Tensor, y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[m, V] @ [V, l], one of m and l few."""
        dtype = dtype or y.dtype
        if dtype == y.dtype and (arguments.on_gpu(x) or x.dtype == y.dtype == torch.float32):
            return _mm(x, y)
        total = torch.zeros(x.shape[0], y.shape[1], dtype=torch.float32, device=x.device)
        size = self._slice(max(x.shape[0], y.shape[1]))
        for part, of_y in zip(x.split(size, 1), y.split(size)):
            total += _mm(part, of_y.to(dtype))
        return total

    def _slice(self, width: int) -> int:
        return max(1, self.workspace_bytes // (8 * width))


def _signs(n: int, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, (n, PROBES), generator=generator, dtype=torch.int64, device="cpu")
    return bits.float() * 2 - 1


def _ratio(error: Tensor, of: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(of, dtype=torch.float32)
    return torch.where(error == 0, 0.0, error / norm)
