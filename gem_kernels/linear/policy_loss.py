"""Any loss of (logprob, entropy) from hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .. import arguments
from ..types import PolicyLossOutput, VocabParallel
from . import operators
from .head import LinearArguments, TokenRows, check_head, products_dtype, token_rows
from .one_shot import OneShot, attach, needs_of, reported, spread


def fused_linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_loss: Callable[..., Tensor],
    *,
    token_inputs: Mapping[str, Tensor] | None = None,
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
) -> PolicyLossOutput:
    """Any loss that is a sum over tokens of a function of (logprob, entropy), from hidden states, in one shot.

        L = sum over chunks of token_loss(logprobs, entropy, **token_inputs)

    `token_loss` is written in plain torch; autograd on its two vectors gives what the head's backward needs, so loss
    and gradients of hidden, weight and bias cost 3 matrix products (2 where the head is frozen), and the logits are
    never whole. Policy gradients with clipping, KL to a reference, entropy bonuses and cross entropy are all of this
    form.

    Args:
        hidden: [..., D]; weight [V, D]; bias [V] or None; targets [...]. These, `rows` and the options
            (`compute_dtype` too): `linear_token_stats`.
        token_loss: (logprobs [n], entropy [n], **inputs [n, ...]) -> scalar, for any run of n tokens. It must be a sum
            over tokens (divide by totals known beforehand, not by n), since it is called once a chunk. It gives a
            gradient to its first two arguments alone. On the CPU it does not see ignored tokens; on a GPU it sees those
            among `rows` with logprob and entropy 0, and drops their gradient. Under torch.compile it is traced with
            what is around it and called once, for all tokens, ignored ones as on a GPU; its gradient comes later, so
            the loss then costs 4 products (3 where the head is frozen).
        token_inputs: tensors shaped [..., *] like `targets` in their leading axes (old log-probs, advantages, masks);
            the rows of the chunk are passed by keyword. They get no gradient.

    Returns:
        PolicyLossOutput(loss, logprobs, entropy, ...): `loss` a float32 scalar, differentiable once in hidden, weight
        and bias; the others detached, shaped like `targets`. With `active_vocab` also the share of columns kept and
        the measured errors of the gradients.

    Raises:
        ValueError: an argument is not as above; token_loss returns something other than a scalar, or its result needs
            the gradient of something else than its arguments (a parameter it captures), which would be lost.

    Example:
        >>> def loss(logprobs, entropy, old, advantages):
        ...     ratio = (logprobs - old).exp()
        ...     clipped = ratio.clamp(0.8, 1.2)
        ...     return -torch.min(ratio * advantages, clipped * advantages).sum() / total_tokens
        >>> out = fused_linear_policy_loss(h, w, ids, loss, token_inputs={"old": old, "advantages": adv})
        >>> out.loss.backward()
    """
    given = LinearArguments(
        hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, logits_dtype, workspace_bytes,
        vocab_parallel, backend, active_vocab, rows, products_dtype(hidden, compute_dtype),
    )  # fmt: skip
    if operators.usable(given):
        return _compiled(given, token_loss, token_inputs or {})
    return _eager(given, token_loss, token_inputs or {})


def _compiled(
    given: LinearArguments, token_loss: Callable[..., Tensor], inputs: Mapping[str, Tensor]
) -> PolicyLossOutput:
    """The loss is traced with what is around it, so its gradient comes after the statistics of all rows."""
    stats = operators.token_stats(given)
    counts = given.targets != given.ignore_index
    if given.rows is not None:
        flat = torch.zeros(counts.numel(), dtype=torch.bool, device=counts.device)
        counts = counts & flat.index_fill(0, given.rows.to(counts.device), True).view(counts.shape)
    vectors = [torch.where(counts, x, 0.0).reshape(-1) for x in (stats.logprobs, stats.entropy)]
    axes = given.targets.dim()
    loss = token_loss(*vectors, **{k: v.reshape(-1, *v.shape[axes:]) for k, v in inputs.items()})
    return PolicyLossOutput(loss.reshape(()).float(), stats.logprobs.detach(), stats.entropy.detach())


@arguments.not_compiled
def _eager(
    given: LinearArguments, token_loss: Callable[..., Tensor], token_inputs: Mapping[str, Tensor]
) -> PolicyLossOutput:
    hidden, weight, bias, targets, rows = given.hidden, given.weight, given.bias, given.targets, given.rows
    head, options = check_head(given)
    if not callable(token_loss):
        arguments.fail(
            "token_loss", "a function (logprobs, entropy, **token_inputs) -> scalar", type(token_loss).__name__
        )
    tokens = token_rows(hidden.detach(), targets, head, options, rows)
    inputs = _flat_inputs(token_inputs, targets, tokens)
    shot = OneShot(tokens, head, needs_of(hidden, weight, bias))
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    out = torch.zeros(2, len(tokens), dtype=torch.float32, device=hidden.device)
    for begin in range(0, len(tokens), head.rows_per_chunk):
        end = min(begin + head.rows_per_chunk, len(tokens))
        out[:, begin:end] = torch.stack(shot.statistics(begin, end))
        logprobs, entropy = (x[begin:end].detach().clone() for x in out)
        part, a, b = _token_gradients(token_loss, logprobs, entropy, {k: v[begin:end] for k, v in inputs.items()})
        loss += part
        shot.gradients(entropy, a, b)
    gradients, report = shot.finish(), reported(shot.report())
    loss = attach(hidden, weight, bias, loss, spread(gradients, hidden, tokens))
    return PolicyLossOutput(loss, *(tokens.spread(x).view(targets.shape) for x in out), **report)


def _flat_inputs(token_inputs: Mapping[str, Tensor], targets: Tensor, rows: TokenRows) -> dict[str, Tensor]:
    flat = {}
    for name, value in token_inputs.items():
        arguments.check_tensor(f"token_inputs[{name!r}]", value, device=targets.device)
        if value.shape[: targets.dim()] != targets.shape:
            arguments.fail(f"token_inputs[{name!r}]", f"of shape {tuple(targets.shape)} + (...)", tuple(value.shape))
        if value.requires_grad:
            arguments.fail(f"token_inputs[{name!r}]", "without requires_grad (it gets no gradient; detach it)", "True")
        value = value.reshape(-1, *value.shape[targets.dim() :])
        flat[name] = value if rows.kept is None else value[rows.kept]
    return flat


def _token_gradients(
    token_loss: Callable[..., Tensor], logprobs: Tensor, entropy: Tensor, inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a chunk, and its gradient with respect to logprobs and entropy."""
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        logprobs.requires_grad_()
        entropy.requires_grad_()
        loss = token_loss(logprobs, entropy, **inputs)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            arguments.fail(
                "token_loss", "a function that returns a scalar", getattr(loss, "shape", type(loss).__name__)
            )
        loss = loss.reshape(())
        a = b = None
        if loss.requires_grad:
            if wanted:
                _refuse_captured(loss, (logprobs, entropy))
            a, b = torch.autograd.grad(loss, (logprobs, entropy), allow_unused=True)
    logprobs.requires_grad_(False)
    entropy.requires_grad_(False)
    zeros = torch.zeros_like(logprobs)
    return loss.detach(), zeros if a is None else a, zeros if b is None else b


def _refuse_captured(loss: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """A tensor that `token_loss` captures and that requires a gradient would get none."""
    seen, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of an AccumulateGrad
        if leaf is not None and not any(leaf is x for x in inputs):
            arguments.fail(
                "token_loss",
                "a function whose gradient goes to its logprobs and entropy alone (detach what else it uses)",
                f"one that uses a tensor {tuple(leaf.shape)} with requires_grad=True",
            )
        nodes += [after for after, _ in node.next_functions]
