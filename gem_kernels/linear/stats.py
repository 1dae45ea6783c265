"""Hidden states and the head's weight -> log-probs and entropies, or entropy scores; the logits are never whole."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import arguments
from ..backends.types import RowGradients
from ..scores import Spans, completion_scores, counted_targets, with_advantages
from ..types import EntropyScoreOutput, LinearScore, TokenStats, VocabParallel
from . import operators
from .head import LinearArguments, check_head, host_layout, products_dtype, token_rows
from .products import statistics, statistics_backward


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, head, options, known):
        rows = token_rows(hidden, targets, head, options, known)
        stats = statistics(rows, head)
        ctx.save_for_backward(hidden, weight, bias, targets, options.temperatures, *stats[1:])
        ctx.head, ctx.options, ctx.known = head, replace(options, temperatures=None), known
        return tuple(rows.spread(x).view(targets.shape) for x in (stats.logprobs, stats.entropy))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, _, _, targets, temperatures, *stats = ctx.saved_tensors
        rows = token_rows(hidden, targets, ctx.head, replace(ctx.options, temperatures=temperatures), ctx.known)
        upstream = (rows.gather(g.reshape(-1)) for g in (grad_logprobs, grad_entropy))
        needs = tuple(ctx.needs_input_grad[:3])
        grads, _ = statistics_backward(rows, ctx.head, RowGradients(*stats, *upstream), needs)
        grad_hidden = None if grads[0] is None else rows.spread(grads[0]).view(hidden.shape)
        return grad_hidden, grads[1], grads[2], None, None, None, None


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
    vocab_parallel: VocabParallel | None = None,
    active_vocab: float | None = None,
    backend: str = "auto",
    rows: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> TokenStats:
    """`token_stats` of softcap(logit_scale * (hidden @ weight.T + bias)), which never exists whole.

    Rows pass through one workspace of at most `workspace_bytes` (at least one row), whatever N. Forward costs one
    matrix product of the whole size, 2 N D V flop; backward makes the logits again and adds one product each for
    `hidden` and `weight` (4 products in all). A gradient that is not needed (a frozen head, say) costs neither memory
    nor product.

    Args:
        hidden: [..., D], float32, bfloat16 or float16.
        weight: [V, D], the same dtype, unless `compute_dtype` is given. Its gradient gathers in float32.
        targets: [...], int64 or int32, in [0, V) or `ignore_index`. On the CPU ignored rows are dropped before the
            product; on a GPU their product is made but not read (a count of them would wait for the device): see
            `rows`.
        bias: [V], or None, of a dtype as `weight` may have; -inf masks a word.
        logit_scale: a positive factor before softcap and temperature (Cohere; 1 / logits_scaling for Granite).
        logits_dtype: of the workspace. None: that of the products, as a model's own logits have it; torch.float32: not
            rounded (`mm` with `out_dtype` on a GPU), for loops that compare with float32 logits, such as verl.
        workspace_bytes: the bound, in bytes: a chunk is workspace_bytes / (V * bytes of a logit) rows. None: 64 MiB on
            a CPU; 1 GiB on a GPU, in multiples of 256 rows (4,096 rows at V = 128,256 in bfloat16). Never more than the
            call has rows for.
        vocab_parallel: a VocabParallel where `weight` (and `bias`) are this rank's shard of a vocabulary that several
            ranks share. None: the whole vocabulary is here.
        active_vocab: a probability such as 2**-12. Backward's products are then made of the columns that any row needs
            at that level, and a low-rank stand-in for the rest (docs/kernels.md): faster and approximate. A GPU is
            waited for once a chunk. 0 is exact; None, exact and without the option's code. Not with `vocab_parallel`.
            The losses of this package return the share of columns kept and the error.
        temperature, softcap, ignore_index, backend: as for `token_stats`.
        rows: [n] int64, on the CPU, increasing: which of the targets (counted through their axes in order) count. The
            others are as ignored ones, and nothing is multiplied for them, on a GPU too. None: all.
        compute_dtype: float32, bfloat16 or float16: `hidden`, `weight` and `bias` are rounded to it, and then
            multiplied, whatever their own dtypes are. Each gradient comes in the dtype of its own tensor; that of a
            float32 weight is never rounded to 16 bits. None: under torch.autocast, its dtype for this device, as for
            F.linear (a dtype given here goes before autocast); else the one dtype of hidden, weight and bias. A weight
            of another dtype is converted whole, for the length of the call (once more in backward), where the copy is
            no larger than `workspace_bytes`; else a slice of the vocabulary at a time, for each product.

    Returns:
        TokenStats(logprobs, entropy), shaped like `targets`, float32; differentiable in hidden, weight and bias, once.

    Raises:
        ValueError: an argument is not as above. Of shards without `vocab_starts`, on all ranks if it is on one.

    Example:
        >>> out = linear_token_stats(hidden[:, :-1], model.lm_head.weight, ids[:, 1:])
        >>> loss = -out.logprobs.mean() - 0.01 * out.entropy.mean()
    """
    given = LinearArguments(
        hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, logits_dtype, workspace_bytes,
        vocab_parallel, backend, active_vocab, rows, products_dtype(hidden, compute_dtype),
    )  # fmt: skip
    if operators.usable(given):
        return operators.token_stats(given)
    return _eager(given)


@arguments.not_compiled
def _eager(given: LinearArguments) -> TokenStats:
    head, options = check_head(given)
    inputs = (given.hidden, given.weight, given.bias, given.targets)
    return TokenStats(*_LinearTokenStats.apply(*inputs, head, options, given.rows))


def fused_linear_entropy_score(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    answer_start: Tensor,
    group_size: int | None = None,
    fork_weight: float = 1.0,
    top_m: float | int = 0.1,
    no_answer: str = "tail",
    valid: Tensor | None = None,
    mapping: str = "identity",
    scale: str = "none",
    eps: float = 1e-4,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    backend: str = "auto",
    score: LinearScore | None = None,
    group_ids: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> EntropyScoreOutput:
    """`fused_entropy_score` from hidden states: the logits never exist whole.

    Args:
        hidden: [B, T, D] with `completion_mask` [B, T], or [N, D] with `cu_seqlens` [B + 1].
        weight: [V, D]; bias [V] or None.
        completion_mask, cu_seqlens: may be on the CPU where the rest is on a GPU; rows that the mask leaves out are
            then not multiplied.
        targets, answer_start, group_size, group_ids, score and the rest: as for `fused_entropy_score` and
            `linear_token_stats`.

    Returns:
        EntropyScoreOutput; logprobs and entropy are differentiable in hidden, weight and bias (4 products with
        backward), the rest are constants of the gradient.

    Raises:
        ValueError: an argument is not as those functions ask.
    """
    completion_mask = arguments.as_mask("completion_mask", completion_mask)
    valid = arguments.as_mask("valid", valid)
    rows = None
    if isinstance(targets, Tensor):
        host = host_layout(targets, completion_mask, cu_seqlens)
        completion_mask, cu_seqlens, rows = host.mask, host.cu_seqlens, host.rows
        arguments.check_layout(targets, "targets", completion_mask, cu_seqlens)
        targets = counted_targets(targets, completion_mask, ignore_index)
    stats = linear_token_stats(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        logits_dtype=logits_dtype,
        workspace_bytes=workspace_bytes,
        vocab_parallel=vocab_parallel,
        backend=backend,
        rows=rows,
        compute_dtype=compute_dtype,
    )
    spans = Spans(completion_mask, cu_seqlens, answer_start, top_m, no_answer, valid, backend)
    scores = completion_scores(stats.entropy, stats.logprobs, spans, fork_weight, score)
    grouping = {"group_size": group_size, "group_ids": group_ids}
    return with_advantages(stats, scores, **grouping, mapping=mapping, scale=scale, eps=eps, backend=backend)
