"""A plugin of axolotl that puts this package's kernels under its RL trainers, which are TRL's.

    plugins:                            # in axolotl's configuration
      - gem_kernels.integrations.axolotl.GemKernelsPlugin

Swapped are the fused head and the helpers `selective_log_softmax` and `entropy_from_logits` of the TRL that is
installed: 1.9, which axolotl 0.19 asks for, or 1.16 (trl.py). Importing this imports axolotl and trl.
"""

from __future__ import annotations

import sys
from typing import Any

import trl as library
from axolotl.integrations.base import BasePlugin
from torch import Tensor

from . import trl
from .swap import Ours, Swap, check_parameters

# Of TRL 1.9.
PARAMETERS = {
    trl.HEAD: "ctx last_hidden weight targets temperature chunk_size final_logit_softcapping logit_scale",
    "selective_log_softmax": "logits index",
    "entropy_from_logits": "logits chunk_size",
}


class GemKernelsPlugin(BasePlugin):
    """Swaps before the model is loaded, after axolotl's own changes to TRL; swaps back when training is over."""

    swap: Swap | None = None

    def pre_model_load(self, cfg: Any) -> None:
        if self.swap is None:
            self.swap = use_gem_kernels()

    def post_train_unload(self, cfg: Any) -> None:
        if self.swap is not None:
            self.swap.undo()
            self.swap = None


def use_gem_kernels() -> Swap:
    """As `trl.use_gem_kernels`, with TRL 1.9 too.

    Raises:
        ValueError: TRL's private names are neither those of 1.9 nor those of 1.16.
    """
    utils = library.trainer.utils
    if any(isinstance(found, Ours) for found in vars(utils).values()):
        return Swap("trl", {})
    if hasattr(utils, "selective_log_softmax_and_entropy"):  # newer than 1.9
        return trl.use_gem_kernels()
    functions: list[Any] = [head, trl.logprobs, trl.entropy]
    pairs: dict[Any, Ours] = {}
    for (name, parameters), function in zip(PARAMETERS.items(), functions):
        found = getattr(utils, name, None)
        forward = getattr(found, "forward", None) if name == trl.HEAD else found
        check_parameters("trl", "1.9 or 1.16", library.__version__, f"trl.trainer.utils.{name}", forward, parameters)
        # Where axolotl has put its own there, the trainers that TRL imported before have TRL's still.
        modules = [module for key, module in list(sys.modules.items()) if key.partition(".")[0] == "trl"]
        for own in {vars(module)[name] for module in modules if name in vars(module)}:
            pairs[own] = Ours(own, function)
    return Swap("trl", pairs)


def head(
    last_hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor] | None:
    """hidden [N, D], weight [V, D], targets [N] -> log-probs and entropies, [N] float32."""
    given = (last_hidden, weight, None, targets, temperature, chunk_size, final_logit_softcapping, logit_scale)
    found: Any = trl.head(*given, outputs=("log_probs", "entropy"))
    return None if found is None else (found[0], found[1])
