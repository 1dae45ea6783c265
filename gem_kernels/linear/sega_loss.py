"""The SEGA loss from hidden states: the public function."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import arguments
from ..types import LinearScore, SegaOutput, VocabParallel
from . import operators
from .head import LinearArguments, products_dtype
from .one_shot import attach, needs_of
from .sega import SegaArguments, sega


def fused_linear_sega_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    answer_start: Tensor | None = None,
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
    advantages: Tensor | None = None,
    loss_type: str = "sum",
    max_completion_length: int | None = None,
    denominator: float | Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    active_vocab: float | None = None,
    backend: str = "auto",
    score: LinearScore | None = None,
    group_ids: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> SegaOutput:
    """`sega_loss` from hidden states: the logits never exist whole, and the gradients are made in forward.

    SEGA's advantages are constants made from the entropies of the very logits they weigh. So where the logits of each
    prompt's candidates fit the workspace together, or the advantages are given, a chunk goes from product to gradients
    at once (`path` "one_shot", 3 products). Where only `hidden` needs a gradient (a frozen head) that is so at any
    length: dHidden is made with weight 1, and multiplied by its sequence's weight, once, in float32, when the group's
    scores are known (2 products). Otherwise ("two_phase") a group's logits are made twice, less the last workspace full
    of them: 3 to 4 products. All give the same numbers.

    Args:
        hidden: [B, T, D] with `completion_mask` [B, T], or [N, D] with `cu_seqlens` [B + 1].
        weight: [V, D]; bias [V] or None. targets: [B, T] or [N].
        group_ids: [B] integers in place of `group_size`, as for `group_advantages`. The whole call is then one group
            for the workspace, since its members may stand anywhere.
        completion_mask, cu_seqlens: may be on the CPU where the rest is on a GPU. Then the rows under a mask's padding
            are left out of the products, and groups are cut where they end, without a wait. `cu_seqlens` on the GPU:
            all groups are one run of chunks.
        The rest: as for `sega_loss` and `linear_token_stats`.

    Returns:
        SegaOutput(loss, ..., path): `loss` a float32 scalar, differentiable once in hidden, weight and bias; its
        gradients are in memory from forward on, and backward scales them in place. With `active_vocab` also the share
        of columns kept and the measured errors of the gradients.

    Raises:
        ValueError: an argument is not as those functions ask.

    On a GPU nothing waits for the device, but for `active_vocab`, which counts its columns.

    Source: GEM (arXiv 2511.13007), Eq. 2.
    """
    given = LinearArguments(
        hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, logits_dtype, workspace_bytes,
        vocab_parallel, backend, active_vocab, None, products_dtype(hidden, compute_dtype),
    )  # fmt: skip
    of = SegaArguments(
        completion_mask, cu_seqlens, answer_start, group_size, fork_weight, top_m, no_answer, valid, mapping, scale,
        eps, advantages, loss_type, max_completion_length, denominator, score, group_ids,
    )  # fmt: skip
    if operators.usable(given):
        return operators.sega_output(given, of)
    return _eager(given, of)


@arguments.not_compiled
def _eager(given: LinearArguments, of: SegaArguments) -> SegaOutput:
    needs = needs_of(given.hidden, given.weight, given.bias)
    out, gradients = sega(given, of, needs)
    return replace(out, loss=attach(given.hidden, given.weight, given.bias, out.loss, gradients))
