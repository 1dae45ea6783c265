"""TRL's trainers with this package's kernels under them.

    from gem_kernels.integrations.trl import use_gem_kernels

    use_gem_kernels()                   # for the rest of the process
    with use_gem_kernels(): ...         # for a block

Swapped are TRL's fused head (behind GRPO, RLOO, SFT, DPO, KTO and their reference models) and its helpers
`selective_log_softmax`, `entropy_from_logits` and `selective_log_softmax_and_entropy`. What the functions of this
package do not compute goes to TRL's own. They are private to TRL, so their parameters are looked at first: written for
TRL 1.16. Importing this imports trl; importing gem_kernels does not import this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import trl
import trl.trainer.utils
from torch import Tensor

from .. import arguments
from ..linear.stats import linear_token_stats
from ..logit_stats import token_stats
from .swap import Ours, Swap, check_parameters

WRITTEN_FOR = "1.16"

# What is swapped in trl.trainer.utils -> its parameters there.
HEAD = "_ChunkedLogProbFunction"
PARAMETERS = {
    HEAD: "ctx hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs",
    "selective_log_softmax": "logits index temperature row_mask",
    "entropy_from_logits": "logits chunk_size",
    "selective_log_softmax_and_entropy": "logits index entropy_requires_grad temperature row_mask",
}
# The columns of the head's result, in TRL's order.
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
IGNORED = -100


def use_gem_kernels() -> Swap:
    """Swaps TRL's fused head and helpers for this package's, at once and for trainers that exist already.

    Goes to TRL's own, call by call:
        the head: where `log_sum_sq_probs` or `is_top1` is asked for (the policy of SFT and DPO), or `mean_logits` with
            a softcap; under DeepSpeed's ZeRO-3; dtypes other than float32, bfloat16 and float16; devices other than CPU
            and CUDA.
        the helpers: several indices a row, rows that do not lie side by side in memory, the same dtypes and devices.

    Dtypes: the head's products run in autocast's dtype where it is on, else in that of the hidden states, as TRL's do;
    the gradients come in the dtype of what they belong to (`compute_dtype` of `linear_token_stats`). The helpers return
    float32, where TRL's on a CPU return the dtype of the logits.

    Returns:
        A Swap: leaving its `with` block, or `.undo()`, puts TRL's own back. A second one within the first does nothing.

    Raises:
        ValueError: trl is not one whose private names are those of 1.16.

    Example:
        >>> with use_gem_kernels():
        ...     GRPOTrainer(model, reward_funcs, args=config, train_dataset=data).train()
    """
    utils = trl.trainer.utils
    if any(isinstance(found, Ours) for found in vars(utils).values()):
        return Swap("trl", {})
    for name, parameters in PARAMETERS.items():
        found = getattr(utils, name, None)
        function = getattr(found, "forward", None) if name == HEAD else found
        check_parameters("trl", WRITTEN_FOR, trl.__version__, f"trl.trainer.utils.{name}", function, parameters)
    ours: dict[str, Callable[..., Any]] = {
        HEAD: head,
        "selective_log_softmax": logprobs,
        "entropy_from_logits": entropy,
        "selective_log_softmax_and_entropy": logprobs_and_entropy,
    }
    return Swap("trl", {getattr(utils, name): Ours(getattr(utils, name), function) for name, function in ours.items()})


# Each function takes what TRL's takes, and returns what that returns, or None where it does not compute it.


def head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = OUTPUTS[1:],
) -> tuple[Tensor | None, ...] | None:
    """hidden [N, D], weight [V, D], bias [V], targets [N] -> five of [N] float32, None where not in `outputs`."""
    tensors = [x for x in (hidden, weight, bias) if x is not None]
    if not all(_computed(x) for x in tensors) or hasattr(weight, "ds_status") or logit_scale <= 0:
        return None
    mean_logits = "mean_logits" in outputs
    if {"log_sum_sq_probs", "is_top1"} & set(outputs) or (mean_logits and final_logit_softcapping is not None):
        return None
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    if dtype not in arguments.LOGIT_DTYPES:
        return None
    stats = linear_token_stats(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=final_logit_softcapping,
        logit_scale=logit_scale, ignore_index=IGNORED, compute_dtype=dtype,
    )  # fmt: skip
    means = (
        _mean_logits(*(x.detach().to(dtype) for x in tensors)) * (logit_scale / temperature) if mean_logits else None
    )
    return stats.logprobs, stats.entropy if "entropy" in outputs else None, None, means, None


def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The mean over words of hidden @ weight.T + bias is hidden @ (mean of weight) + (mean of bias)."""
    with torch.autocast(hidden.device.type, enabled=False):
        means = hidden.float() @ weight.mean(0, dtype=torch.float32)
        return means if bias is None else means + bias.mean(dtype=torch.float32)


def logprobs(logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None) -> Tensor | None:
    stats = _stats(logits, index, temperature, row_mask)
    return None if stats is None else stats.logprobs


def entropy(logits: Tensor, chunk_size: int = 128) -> Tensor | None:
    stats = _stats(logits, torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device))
    return None if stats is None else stats.entropy


def logprobs_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    stats = _stats(logits, index, temperature, row_mask)
    if stats is None:
        return None
    return stats.logprobs, stats.entropy if entropy_requires_grad else stats.entropy.detach()


def _stats(logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None) -> Any:
    whole = index.shape == logits.shape[:-1] and index.dtype in (torch.int64, torch.int32)
    if not whole or not _computed(logits) or logits.stride(-1) != 1 or temperature <= 0:
        return None
    if row_mask is not None:
        index = index.masked_fill(row_mask == 0, IGNORED)
    return token_stats(logits, index, temperature=temperature, ignore_index=IGNORED)


def _computed(x: Tensor) -> bool:
    return x.device.type in ("cpu", "cuda") and x.dtype in arguments.LOGIT_DTYPES
