"""axolotl: the plugin through axolotl's own manager, and TRL 1.9's fused head and helpers with it."""

from __future__ import annotations

import torch
import trl.trainer.grpo_trainer as importer
import trl.trainer.utils as utils
from axolotl.integrations.base import PluginManager

from gem_kernels.integrations.axolotl import PARAMETERS
from gem_kernels.integrations.swap import Ours
from tests.integrations.others.checks import compare, exact, inputs, run, versions

NAME = "gem_kernels.integrations.axolotl.GemKernelsPlugin"


def head(hidden, weight, targets):
    """As TRL calls it: temperature, words a chunk, softcap, logit scale."""
    return utils._ChunkedLogProbFunction.apply(hidden, weight, targets, 0.7, 64, 5.0, 1.3)


def check(dtype: torch.dtype, manager: PluginManager) -> None:
    hidden, weight, targets = inputs(dtype, 37)
    logits = (hidden.float() @ weight.float().t()).to(dtype)

    def heads(h, w):
        return head(h, w, targets)

    def helpers(z):
        return importer.selective_log_softmax(z, targets), importer.entropy_from_logits(z)

    def reference(h, w):
        return exact(5.0 * torch.tanh(1.3 * (h @ w.t()) / 5.0) / 0.7, targets)

    own = run(heads, [hidden, weight]), run(helpers, [logits])
    manager.pre_model_load({})
    assert all(isinstance(getattr(utils, name), Ours) for name in PARAMETERS)
    ours = run(heads, [hidden, weight]), run(helpers, [logits])
    manager.post_train_unload({})
    assert not any(isinstance(getattr(utils, name), Ours) for name in PARAMETERS)
    compare(f"the fused head, {dtype}", ours[0], own[0], run(reference, [hidden.double(), weight.double()]))
    compare(f"the helpers, {dtype}", ours[1], own[1], run(lambda z: exact(z, targets), [logits.double()]))


if __name__ == "__main__":
    versions("axolotl", "trl", "transformers")
    _manager = PluginManager.get_instance()
    _manager.register(NAME)
    assert list(_manager.plugins) == [NAME]
    for _dtype in (torch.float32, torch.bfloat16):
        check(_dtype, _manager)
    print("axolotl: all as expected")
