"""OpenRLHF's two helpers by this package's kernels: the log-probs and entropies of its actor.

    from gem_kernels.integrations.openrlhf import use_gem_kernels

    use_gem_kernels()                   # in each process that trains

Swapped are `log_probs_from_logits` and `compute_entropy` of openrlhf.models.utils, wherever OpenRLHF has imported
them. They are private to it, so their parameters are looked at first: written for OpenRLHF 0.11. Importing this imports
nothing of OpenRLHF.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..logit_stats import token_stats
from .swap import Ours, Swap, check_parameters, computed_here, loaded, version_of

WRITTEN_FOR = "0.11"
HELPERS = "openrlhf.models.utils"
PARAMETERS = {"log_probs_from_logits": "logits labels temperature", "compute_entropy": "logits"}


def use_gem_kernels() -> Swap:
    """Swaps the two helpers, at once and for actors that exist already.

    Goes to OpenRLHF's own, call by call: devices other than CPU and CUDA; dtypes other than float32, bfloat16 and
    float16; logits whose last axis is strided. The helpers return float32. Where a temperature is given, the logits
    stay as they are: OpenRLHF's own divides them in place.

    Returns:
        A Swap: leaving its `with` block, or `.undo()`, puts OpenRLHF's own back. A second one within the first does
            nothing.

    Raises:
        ValueError: openrlhf is not installed, or is not one whose helpers are those of 0.11.
    """
    helpers, _ = loaded("openrlhf", WRITTEN_FOR, HELPERS, "openrlhf.models.actor")
    if any(isinstance(found, Ours) for found in vars(helpers).values()):
        return Swap("openrlhf", {})
    version = version_of("openrlhf")
    pairs: dict[Any, Ours] = {}
    functions: list[Any] = [logprobs, entropy]
    for (name, parameters), function in zip(PARAMETERS.items(), functions):
        own = getattr(helpers, name, None)
        check_parameters("openrlhf", WRITTEN_FOR, version, f"{HELPERS}.{name}", own, parameters)
        pairs[own] = Ours(own, function)
    return Swap("openrlhf", pairs)


def logprobs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor | None:
    if labels.shape != logits.shape[:-1] or not _rows(logits) or temperature <= 0:
        return None
    return token_stats(logits, labels.long(), temperature=temperature).logprobs


def entropy(logits: Tensor) -> Tensor | None:
    if not _rows(logits):
        return None
    return token_stats(logits, torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)).entropy


def _rows(logits: Tensor) -> bool:
    return computed_here(logits) and logits.stride(-1) == 1
