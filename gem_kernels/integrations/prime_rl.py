"""prime-rl's fused output head by this package's kernels, and the SEGA loss as its custom loss.

    from gem_kernels.integrations.prime_rl import use_gem_kernels

    use_gem_kernels()                   # in the trainer's process

Swapped are the autograd functions behind `FusedOutputLinear` and, for Gemma, `GemmaFusedOutputLinear`. Gradients flow
through the entropy too, which prime-rl 0.8 refuses. They are private to it, so their parameters are looked at first.
Importing this imports nothing of prime-rl.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..linear.stats import linear_token_stats
from .swap import Ours, Swap, check_parameters, computed_here, loaded, version_of

WRITTEN_FOR = "0.8"
LAYERS = "prime_rl.trainer.models.layers"
LOSSES = "prime_rl.trainer.rl.loss"
HEAD, GEMMA = "_SequenceChunkedLogProbEntropyFn", "_GemmaChunkedLogProbEntropyFn"
# Of their forward.
PARAMETERS = {
    HEAD: "ctx hidden weight labels inv_temperature chunk_size sampling_mask",
    GEMMA: "ctx hidden weight labels inv_temperature chunk_size softcap",
}


def use_gem_kernels() -> Swap:
    """Swaps prime-rl's two fused heads, at once and for models that exist already.

    Goes to prime-rl's own, call by call: a `sampling_mask` (log-probs within a nucleus); devices other than CPU and
    CUDA; dtypes other than float32, bfloat16 and float16; a head whose weight has another dtype than the hidden states.

    Logits are float32 and not rounded to the dtype of the hidden states, as prime-rl's own are: its loss compares them
    with the log-probs of vLLM.

    Returns:
        A Swap: leaving its `with` block, or `.undo()`, puts prime-rl's own back. A second one within the first does
            nothing.

    Raises:
        ValueError: prime-rl is not installed, or is not one whose heads are those of 0.8.
    """
    modules = loaded("prime_rl", WRITTEN_FOR, f"{LAYERS}.lm_head", f"{LAYERS}.lm_head_gemma")
    if any(isinstance(found, Ours) for module in modules for found in vars(module).values()):
        return Swap("prime_rl", {})
    version = version_of("prime-rl")
    functions: list[Any] = [head, gemma_head]
    pairs: dict[Any, Ours] = {}
    for (name, parameters), function, module in zip(PARAMETERS.items(), functions, modules):
        own = getattr(module, name, None)
        forward = getattr(own, "forward", None)
        check_parameters("prime_rl", WRITTEN_FOR, version, f"{module.__name__}.{name}.forward", forward, parameters)
        pairs[own] = Ours(own, function)
    return Swap("prime_rl", pairs)


def head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    inv_temperature: Tensor,
    chunk_size: int,
    sampling_mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor] | None:
    """hidden [N, D], weight [V, D], labels [N], 1 / temperature [N] -> log-probs and entropies, [N] float32."""
    here = computed_here(hidden) and computed_here(weight) and hidden.dtype == weight.dtype
    if sampling_mask is not None or not here:
        return None
    stats = linear_token_stats(
        hidden, weight, labels.long(), temperature=1.0 / inv_temperature.float(), softcap=softcap,
        logits_dtype=torch.float32,
    )  # fmt: skip
    return stats.logprobs, stats.entropy


def gemma_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, inv_temperature: Tensor, chunk_size: int, softcap: float
) -> tuple[Tensor, Tensor] | None:
    return head(hidden, weight, labels, inv_temperature, chunk_size, None, softcap)


def sega_loss(inputs: Any, importance_cap: float | None = None) -> Any:
    """The SEGA loss of one sequence, as a custom loss of prime-rl.

        L = -sum_t w_t A_t logprob_t    over the counted tokens;    w_t = min(p_t / q_t, importance_cap), or 1

    p is the probability of the token in the trainer, q in the sampler that drew it; A and w are constants of the
    gradient. prime-rl divides the sum over all sequences by the number of their tokens: that is `loss_type: token`.
    prime-rl hands no entropies to losses and advantages, so A comes from its own orchestrator.

    Args:
        inputs: prime-rl's LossInputs: log-probs of trainer and sampler, advantages, mask and weights, each [T].
        importance_cap: None: no weights, for data of the policy itself.

    Returns:
        prime-rl's LossOutputs, with the metrics gem/importance (mean of p / q) and gem/logprob.

    Raises:
        ValueError: prime-rl is not installed, or importance_cap is not a positive number.

    Example:
        [trainer.loss]
        type = "custom"
        import_path = "gem_kernels.integrations.prime_rl.sega_loss"
        kwargs = { importance_cap = 2.0 }

    Source: GEM (arXiv 2511.13007), Eq. 2.
    """
    (losses,) = loaded("prime_rl", WRITTEN_FOR, LOSSES)
    if importance_cap is not None:
        arguments.check_number("importance_cap", importance_cap, above=0.0)
    logprobs, mask = inputs.trainer_logprobs, inputs.loss_mask
    ratio = (logprobs.detach() - inputs.inference_logprobs).exp()
    weights = torch.ones_like(ratio) if importance_cap is None else ratio.clamp(max=importance_cap)
    if getattr(inputs, "loss_weights", None) is not None:
        weights = weights * inputs.loss_weights
    factors = torch.where(mask, weights * inputs.advantages.detach(), 0.0)
    loss = -(factors * torch.where(mask, logprobs, 0.0)).sum()
    few = mask.sum().clamp_min(1)
    metrics = {
        "gem/importance": torch.where(mask, ratio, 0.0).sum() / few,
        "gem/logprob": torch.where(mask, logprobs.detach(), 0.0).sum() / few,
    }
    return losses.LossOutputs(loss=loss, metrics=metrics)
