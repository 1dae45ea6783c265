"""OpenRLHF: its two helpers alone, and its Actor's forward with them.

flash-attn and deepspeed, which need a GPU's compiler, are empty stand-ins here, as in OpenRLHF's own CPU tests: none of
their functions is called.
"""

from __future__ import annotations

import importlib.machinery
import sys
from unittest.mock import MagicMock

import torch
import transformers

from gem_kernels.integrations import openrlhf as integration
from gem_kernels.integrations.swap import Ours
from tests.integrations.others.checks import V, compare, exact, inputs, run, versions

for _name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed", "deepspeed"):
    sys.modules[_name] = MagicMock(__spec__=importlib.machinery.ModuleSpec(_name, None))

from openrlhf.models import actor as actors  # noqa: E402
from openrlhf.models import utils as helpers  # noqa: E402


def the_helpers() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, targets = inputs(dtype, 2, 37)
        logits = (hidden.float() @ weight.float().t()).to(dtype)

        def call(z, targets=targets):
            return helpers.log_probs_from_logits(z, targets), helpers.compute_entropy(z)

        own, truth = run(call, [logits]), run(lambda z, targets=targets: exact(z, targets), [logits.double()])
        with integration.use_gem_kernels():
            assert isinstance(actors.compute_entropy, Ours) and isinstance(actors.log_probs_from_logits, Ours)
            ours = run(call, [logits])
        compare(f"log_probs_from_logits, compute_entropy, {dtype}", ours, own, truth)
    assert not isinstance(actors.compute_entropy, Ours)


def the_actor() -> None:
    """Log-probs, entropies and the gradients of a tiny model through `Actor.forward`, at a temperature of 0.8."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    actor = actors.Actor(transformers.LlamaForCausalLM(config))
    actor.temperature, actor.packing_samples = 0.8, False
    ids = torch.randint(0, V, (2, 9))
    parameters = dict(actor.named_parameters())

    def call(*values):
        tensors = dict(zip(parameters, values))
        given = {"return_output": True, "return_logprobs": True, "return_entropy": True}
        logprobs, output = torch.func.functional_call(actor, tensors, (ids, None, torch.ones_like(ids)), given)
        return logprobs, output.entropy

    def reference(*values):
        tensors = {name.removeprefix("model."): value for name, value in zip(parameters, values)}
        logits = torch.func.functional_call(actor.model.double(), tensors, (ids,)).logits[:, :-1]
        return exact(logits / 0.8, ids[:, 1:])

    leaves = list(parameters.values())
    own = run(call, leaves)
    with integration.use_gem_kernels():
        ours = run(call, leaves)
    compare("Actor.forward, a tiny model, float32", ours, own, run(reference, [x.double() for x in leaves]))


if __name__ == "__main__":
    versions("openrlhf", "transformers")
    the_helpers()
    the_actor()
    print("openrlhf: all as expected")
