"""verl's log-probs and entropies by this package's kernels, and its advantage estimator "sega".

    VERL_USE_EXTERNAL_PLUGINS=gem_kernels python -m verl.trainer.main_ppo ...     # in every process of a run

The entry point `gem_kernels` of the group `verl.plugins` (verl_plugin.py) calls `use_gem_kernels` and `register_sega`
where that variable names it; where it does not, nothing changes. Swapped are `FusedLinearForPPO.forward` (behind
`use_fused_kernels=True` with `impl_backend` torch or liger), `logprobs_from_logits`, `entropy_from_logits` and
`entropy_from_logits_with_chunking`. verl does not promise them, so their parameters are looked at first: written for
verl 0.9. Importing this imports nothing of verl.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..linear.stats import linear_token_stats
from ..logit_stats import token_stats
from .settings import Sega, settings_of
from .swap import Ours, Swap, check_parameters, computed_here, loaded

WRITTEN_FOR = "0.9"
HELPERS = "verl.utils.torch_functional"
HEADS = "verl.utils.experimental.torch_functional"
ALGORITHMS = "verl.trainer.ppo.core_algos"

# What is swapped -> its parameters.
HEAD = "self hidden_states vocab_weights input_ids temperature"
PARAMETERS = {
    "logprobs_from_logits": "logits labels inplace_backward",
    "entropy_from_logits": "logits",
    "entropy_from_logits_with_chunking": "logits chunk_size",
}


def use_gem_kernels() -> Swap:
    """Swaps verl's fused head (its backends torch and liger) and three helpers for this package's, at once.

    Call it before verl makes its engines: they keep the entropy function that they find.

    Goes to verl's own, call by call: devices other than CPU and CUDA; dtypes other than float32, bfloat16 and float16;
    sharded tensors (DTensor); a head whose weight has another dtype than the hidden states.

    Dtypes: log-probs and entropies are float32, from logits that are not rounded to bfloat16
    (`logits_dtype=torch.float32`). verl's own round the head's logits, and the helpers' results on a CPU.

    Returns:
        A Swap: leaving its `with` block, or `.undo()`, puts verl's own back. A second one within the first does
            nothing.

    Raises:
        ValueError: verl is not installed, or is not one whose functions are those of 0.9.
    """
    verl, helpers, heads = loaded("verl", WRITTEN_FOR, "verl", HELPERS, HEADS)
    head = getattr(heads, "FusedLinearForPPO", None)
    own = getattr(head, "forward", None)
    if isinstance(own, Ours):
        return Swap("verl", {})
    check_parameters("verl", WRITTEN_FOR, verl.__version__, f"{HEADS}.FusedLinearForPPO.forward", own, HEAD)
    for name, parameters in PARAMETERS.items():
        found = getattr(helpers, name, None)
        check_parameters("verl", WRITTEN_FOR, verl.__version__, f"{HELPERS}.{name}", found, parameters)
    functions: dict[str, Any] = dict(zip(PARAMETERS, (logprobs, entropy, entropy)))
    pairs = {getattr(helpers, name): Ours(getattr(helpers, name), function) for name, function in functions.items()}
    return Swap("verl", pairs, [(head, "forward", Ours(own, fused_head))])  # type: ignore[list-item]


# Each function takes what verl's takes, and returns what that returns, or None where it does not compute it.


def fused_head(
    module: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: Any = 1.0
) -> tuple[Tensor, Tensor] | None:
    """[..., D], [V, D], [...] -> log-probs and entropies, [...] float32."""
    same = hidden_states.dtype == vocab_weights.dtype
    if not (same and computed_here(hidden_states) and computed_here(vocab_weights)):
        return None
    stats = linear_token_stats(
        hidden_states, vocab_weights, input_ids.long(), temperature=temperature, logits_dtype=torch.float32
    )
    return stats.logprobs, stats.entropy


def logprobs(logits: Tensor, labels: Tensor, inplace_backward: bool = False) -> Tensor | None:
    """Over the logits, as flash-attn's cross entropy in verl does, only where the caller says so."""
    if labels.shape != logits.shape[:-1] or not _rows(logits):
        return None
    inplace = inplace_backward and logits.is_contiguous()
    return token_stats(logits, labels.long(), inplace_backward=inplace).logprobs


def entropy(logits: Tensor, chunk_size: int = 2048) -> Tensor | None:
    if not _rows(logits):
        return None
    return token_stats(logits, torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)).entropy


def _rows(logits: Tensor) -> bool:
    return computed_here(logits) and logits.stride(-1) == 1


# The advantage estimator.


@dataclass
class Stored:
    """Of one batch, on the driver: what verl's trainer does not hand to its estimators."""

    entropy: Tensor
    """[B, T] nats."""
    answer_start: Tensor | None = None
    """[B]."""
    metrics: dict[str, float] | None = None
    """Filled by the estimator."""


_stored: ContextVar[Stored | None] = ContextVar("gem_kernels_verl_stored", default=None)


@contextlib.contextmanager
def stored(batch: Stored) -> Iterator[Stored]:
    """Within it, `sega_advantages` reads these entropies."""
    token = _stored.set(batch)
    try:
        yield batch
    finally:
        _stored.reset(token)


def sega_settings(config: Any) -> Sega:
    """`sega` of verl's `algorithm` (`+algorithm.sega.fork_weight=0.5` sets one)."""
    return settings_of(None if config is None else config.get("sega", None), "algorithm.sega")


def sega_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    config: Any = None,
    entropy: Tensor | None = None,
    answer_start: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """verl's advantage estimator "sega": A_i of each completion, from the entropies of its own tokens.

        A = group_advantages(entropy_scores(entropy, ...).score, group_ids=index)        on each counted token

    The rewards are not used; nor is, then, a KL term in them.

    Args:
        token_level_rewards: [B, T], of verl.
        response_mask: [B, T], 1 counts.
        index: [B], equal for completions of one prompt: verl's `uid`.
        config: verl's `algorithm`; its `sega` has the settings of `Sega`.
        entropy: [B, T]; None: those that the trainer "sega" (verl_sega.py) has stored.
        answer_start: [B], as for `entropy_scores`; None: no answer is known, see `no_answer`.

    Returns:
        Advantages [B, T] float32, and the same once more as verl's returns.

    Raises:
        ValueError: there are no entropies or no uids, or a setting is unknown.
    """
    settings, batch = sega_settings(config), _stored.get()
    if entropy is None and batch is not None:
        entropy, answer_start = batch.entropy, batch.answer_start
    if entropy is None:
        setting = "VERL_USE_EXTERNAL_MODULES=gem_kernels.integrations.verl_sega and trainer.v1.trainer_mode=sega"
        arguments.fail("entropy", f"given, or stored by the trainer of {setting}", "None")
    if index is None:
        arguments.fail("index", "verl's uid of each sequence", "None")
    numbers: dict[Any, int] = {}
    ids = torch.tensor([numbers.setdefault(uid, len(numbers)) for uid in index], dtype=torch.int64, device="cpu")
    if answer_start is None:
        answer_start = torch.full((entropy.shape[0],), -1, dtype=torch.int64, device=entropy.device)
    scores = settings.scores(entropy, response_mask.long(), answer_start)
    advantages = settings.advantages(scores.score, scores.valid, ids.to(scores.score.device))
    if batch is not None:
        few = scores.valid.sum().clamp_min(1)
        names = ("score", "final_entropy", "fork_entropy")
        batch.metrics = {f"gem/{name}": float(getattr(scores, name).sum() / few) for name in names}
        batch.metrics["gem/valid"] = float(scores.valid.float().mean())
    spread = advantages[:, None] * response_mask
    return spread, spread


def register_sega() -> None:
    """Registers `sega_advantages` as verl's advantage estimator "sega" (`algorithm.adv_estimator=sega`).

    Raises:
        ValueError: verl is not installed, or has no such registry.
    """
    verl, algorithms = loaded("verl", WRITTEN_FOR, "verl", ALGORITHMS)
    register = getattr(algorithms, "register_adv_est", None)
    check_parameters("verl", WRITTEN_FOR, verl.__version__, f"{ALGORITHMS}.register_adv_est", register, "name_or_enum")
    register("sega")(sega_advantages)  # type: ignore[misc]
