"""The functions of hidden states as operators, for torch.compile: it sees one node with a fake implementation and a
backward, where its graph would else break. An operator's body is what runs eagerly, checks included.

    gem_kernels::linear_stats, linear_stats_backward    log-probs and entropies, and their gradients
    gem_kernels::linear_sega                            the SEGA loss with its gradients, in one shot where that can be

A number among an operator's arguments would be compiled in, and compiled again for the next; so numbers travel as a
float64 tensor on the CPU. A vocabulary in shards has no operator, for its process group is no argument of one; nor has
the active vocabulary, which returns its errors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.types import RowGradients
from ..types import FEATURES, LinearScore, SegaOutput, TokenStats
from .head import LinearArguments, check_head, token_rows
from .one_shot import needs_of
from .products import held_dtype, statistics, statistics_backward
from .sega import SegaArguments, sega

# numbers: temperature, softcap, logit_scale, and of linear_sega fork_weight, eps, top_m, denominator.
HEAD = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? temperatures, Tensor numbers, "
    "bool has_softcap, SymInt ignore_index, ScalarType? logits_dtype, SymInt? workspace_bytes, str backend, "
    "ScalarType? compute_dtype"
)
N_HEAD = HEAD.count(",") + 1


def usable(given: LinearArguments) -> bool:
    """Under torch.compile, of what there are operators for."""
    return torch.compiler.is_compiling() and given.vocab_parallel is None and given.active_vocab is None


def _numbers(*values: Any) -> Tensor:
    """[n] float64 on the CPU; 0 for None and tensors. A product takes another number without another compilation."""
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * (0.0 if value is None or isinstance(value, Tensor) else value) for value in values])


def _flat(given: LinearArguments, *more: Any) -> tuple:
    """The arguments of HEAD. more: further numbers."""
    tau = given.temperature
    numbers = _numbers(tau, given.softcap, given.logit_scale, *more)
    return (
        given.hidden, given.weight, given.targets, given.bias, tau if isinstance(tau, Tensor) else None, numbers,
        given.softcap is not None, given.ignore_index, given.logits_dtype, given.workspace_bytes, given.backend,
        given.compute_dtype,
    )  # fmt: skip


def _given(flat: tuple, rows: Any = None) -> tuple[LinearArguments, list[float]]:
    """Back from `_flat`; and the numbers."""
    (hidden, weight, targets, bias, temperatures, numbers, has_softcap, ignore_index, dtype, workspace, backend,
     compute_dtype) = flat  # fmt: skip
    found = numbers.tolist()
    tau, softcap = found[0] if temperatures is None else temperatures, found[1] if has_softcap else None
    given = LinearArguments(
        hidden, weight, targets, bias, tau, softcap, found[2], ignore_index, dtype, workspace, None, backend, None,
        rows, compute_dtype,
    )  # fmt: skip
    return given, found


def _or_empty(x: Any, like: Tensor) -> Tensor:
    """An operator returns tensors."""
    return like.new_empty(0) if x is None else x


def _fake_gradients(flat: tuple, needs: tuple, held: bool) -> tuple:
    """Of hidden, weight and bias."""
    found = []
    for x, wanted in zip((flat[0], flat[1], flat[3]), needs):
        shape, dtype = (x.shape, held_dtype(x.dtype) if held else x.dtype) if wanted else ((0,), flat[0].dtype)
        found.append(torch.empty(shape, dtype=dtype, device=flat[0].device))
    return tuple(found)


# Log-probs and entropies.


@torch.library.custom_op(
    "gem_kernels::linear_stats", mutates_args=(), schema=f"({HEAD}, Tensor? rows) -> (Tensor, Tensor, Tensor, Tensor)"
)
def linear_stats_op(*flat):
    """-> logprobs, entropy, row_max, log_sum, each shaped like `targets`, float32."""
    known = flat[N_HEAD]
    given, _ = _given(flat[:N_HEAD], known)
    head, options = check_head(given)
    rows = token_rows(given.hidden, given.targets, head, options, known)
    # Four results of their own: an operator may not return views of one buffer.
    return tuple(rows.spread(x).reshape(given.targets.shape).clone() for x in statistics(rows, head))


@linear_stats_op.register_fake
def _(*flat):
    return tuple(torch.empty(flat[2].shape, dtype=torch.float32, device=flat[0].device) for _ in range(4))


@torch.library.custom_op(
    "gem_kernels::linear_stats_backward",
    mutates_args=(),
    schema=f"({HEAD}, Tensor? rows, Tensor entropy, Tensor row_max, Tensor log_sum, Tensor grad_logprobs, "
    "Tensor grad_entropy, bool[] needs) -> (Tensor, Tensor, Tensor)",
)
def linear_stats_backward_op(*flat):
    """-> the gradients of hidden, weight and bias; empty where not needed."""
    known, *vectors, needs = flat[N_HEAD:]
    given, _ = _given(flat[:N_HEAD], known)
    head, options = check_head(given)
    rows = token_rows(given.hidden, given.targets, head, options, known)
    gathered = RowGradients(*(rows.gather(x.reshape(-1)) for x in vectors))
    grads, _ = statistics_backward(rows, head, gathered, tuple(needs))
    grad_hidden = None if grads[0] is None else rows.spread(grads[0]).view(given.hidden.shape)
    return tuple(_or_empty(x, given.hidden) for x in (grad_hidden, *grads[1:]))


@linear_stats_backward_op.register_fake
def _(*flat):
    return _fake_gradients(flat, flat[-1], held=False)


def _setup_stats(ctx, inputs, output):
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *output[1:])
    ctx.places = [None if isinstance(x, Tensor) else (x,) for x in inputs]
    ctx.mark_non_differentiable(*output[2:])


def _backward_stats(ctx, grad_logprobs, grad_entropy, _max, _sum):
    *tensors, entropy, row_max, log_sum = ctx.saved_tensors
    left = iter(tensors)
    inputs = [next(left) if place is None else place[0] for place in ctx.places]
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    zeros = torch.zeros_like(entropy)
    a, b = (zeros if g is None else g for g in (grad_logprobs, grad_entropy))
    grads = linear_stats_backward_op(*inputs, entropy, row_max, log_sum, a, b, needs)
    hidden, weight, bias = (g if wanted else None for g, wanted in zip(grads, needs))
    return hidden, weight, None, bias, *[None] * (len(inputs) - 4)


linear_stats_op.register_autograd(_backward_stats, setup_context=_setup_stats)


def token_stats(given: LinearArguments) -> TokenStats:
    logprobs, entropy, _, _ = linear_stats_op(*_flat(given), given.rows)
    return TokenStats(logprobs, entropy)


# The SEGA loss.

SEGA = (
    "Tensor? completion_mask, Tensor? cu_seqlens, Tensor? answer_start, SymInt? group_size, Tensor? group_ids, "
    "SymInt top_count, str no_answer, Tensor? valid, str mapping, str scale, Tensor? advantages, str loss_type, "
    "SymInt? max_completion_length, Tensor? denominator, bool has_denominator, float[]? score, bool[] needs"
)


@torch.library.custom_op(
    "gem_kernels::linear_sega", mutates_args=(), schema=f"({HEAD}, {SEGA}) -> ({', '.join(['Tensor'] * 11)})"
)
def linear_sega_op(*flat):
    """-> the tensors of a SegaOutput, then the gradients of hidden, weight and bias; empty where not needed."""
    (mask, cu_seqlens, answer_start, group_size, group_ids, top_count, no_answer, valid, mapping, scale, advantages,
     loss_type, longest, Z, has_Z, score, needs) = flat[N_HEAD:]  # fmt: skip
    given, numbers = _given(flat[:N_HEAD])
    fork_weight, eps, top_share, number = numbers[3:]
    linear = None if score is None else LinearScore({f: w for f, w in zip(FEATURES, score) if w} or {FEATURES[0]: 0.0})
    of = SegaArguments(
        mask, cu_seqlens, answer_start, group_size, fork_weight, top_count or top_share, no_answer, valid, mapping,
        scale, eps, advantages, loss_type, longest, Z if Z is not None or not has_Z else number, linear,
        group_ids,
    )  # fmt: skip
    out, gradients = sega(given, of, tuple(needs))
    values = (
        out.loss,
        out.score,
        out.final_entropy,
        out.fork_entropy,
        out.valid,
        out.advantages,
        out.logprobs,
        out.entropy,
    )
    return *(x.clone() for x in values), *(_or_empty(x, given.hidden) for x in gradients)


@linear_sega_op.register_fake
def _(*flat):
    hidden, targets, mask, cu_seqlens = flat[0], flat[2], *flat[N_HEAD : N_HEAD + 2]
    B = mask.shape[0] if mask is not None else cu_seqlens.shape[0] - 1

    def floats(*shape):
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    valid = torch.empty(B, dtype=torch.bool, device=hidden.device)
    tokens = floats(*targets.shape), floats(*targets.shape)
    gradients = _fake_gradients(flat, flat[-1], held=True)
    return floats(), floats(B), floats(B), floats(B), valid, floats(B), *tokens, *gradients


def _setup_sega(ctx, inputs, output):
    ctx.save_for_backward(*output[8:])
    ctx.needs, ctx.count = inputs[-1], len(inputs)
    ctx.dtypes = [None if inputs[i] is None else inputs[i].dtype for i in (0, 1, 3)]
    ctx.mark_non_differentiable(*output[1:])


def _backward_sega(ctx, upstream, *_):
    grads = [
        (g * upstream.reshape([1] * g.dim())).to(dtype) if wanted else None
        for g, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs)
    ]
    return grads[0], grads[1], None, grads[2], *[None] * (ctx.count - 4)


linear_sega_op.register_autograd(_backward_sega, setup_context=_setup_sega)


def sega_output(given: LinearArguments, of: SegaArguments) -> SegaOutput:
    """`path` is "compiled": which way is taken is found when it runs."""
    Z, top_m = of.denominator, of.top_m
    count = top_m if isinstance(top_m, int) else 0
    coefficients = None if of.score is None else list(of.score.coefficients)
    found = linear_sega_op(
        *_flat(given, of.fork_weight, of.eps, 0.0 if count else top_m, Z),
        of.completion_mask, of.cu_seqlens, of.answer_start, of.group_size, of.group_ids, count, of.no_answer, of.valid,
        of.mapping, of.scale, of.advantages, of.loss_type, of.max_completion_length,
        Z if isinstance(Z, Tensor) else None, Z is not None,
        coefficients, list(needs_of(given.hidden, given.weight, given.bias)),
    )  # fmt: skip
    loss, score, final, fork, valid, advantages, logprobs, entropy, *_ = found
    return SegaOutput(loss, score, final, fork, valid, advantages, logprobs, entropy, path="compiled")
