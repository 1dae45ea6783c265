"""The model's forward: prompts shared, joined or packed, under adapters, checkpointing and wrappers: one result."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Gemma2Config, Gemma2ForCausalLM

from gem.config.settings import Lora
from gem.model import forward
from gem.model.forward import Policy
from gem.model.load import checkpoint_activations
from gem.model.lora import add_lora
from gem_kernels.integrations.transformers import causal_lm_head
from tests.helpers import rollout_of, tiny_model

KINDS = ("plain", "lora", "checkpointed", "lora checkpointed", "ddp", "lora ddp")


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def made(kind):
    model = tiny_model()
    if "checkpointed" in kind:
        checkpoint_activations(model)
    if "lora" in kind:
        torch.manual_seed(0)
        model = add_lora(model, Lora(lora_r=4))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
    if "ddp" in kind:
        model = DistributedDataParallel(model)
    return model.train()


def run(model, batch, monkeypatch, *, share=None, padding_free=False):
    """Loss, gradients by name, and how many tokens went through the first layer."""
    if share is not None:
        monkeypatch.setattr(forward, "can_share_prompt", lambda _: share)
    causal_lm_head(model)  # its check is a forward of its own
    tokens = []
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0"))
    hook = layer.register_forward_hook(lambda module, args, output: tokens.append(args[0].shape[:2].numel()))
    stats = forward.completion_stats(Policy(model, padding_free), batch)
    loss = (stats.logprobs * torch.linspace(-1, 1, stats.logprobs.numel()).view_as(stats.logprobs)).sum()
    loss.backward()
    hook.remove()
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, sum(tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_joined_and_packed_prompts_give_one_gradient(kind, group, monkeypatch):
    batch = rollout_of(num_prompts=3, size=3).batch
    truth = run(made("lora" if "lora" in kind else "plain"), batch, monkeypatch, share=False)
    monkeypatch.undo()
    joined = 9 * (batch.prompt_ids.shape[1] + batch.completion_ids.shape[1] - 1)
    packed = int(3 * batch.prompt_mask.sum() + batch.lengths.sum()) - 9
    assert packed < joined == truth[2]
    shared = 3 * (batch.prompt_ids.shape[1] - 1) + 9 * batch.completion_ids.shape[1]
    for padding_free in (False, True):
        loss, gradients, tokens = run(made(kind), batch, monkeypatch, padding_free=padding_free)
        assert loss == pytest.approx(truth[0], rel=1e-4)
        assert set(gradients) == set(truth[1])
        for name, gradient in gradients.items():
            expected = truth[1][name]
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
        # In backward a checkpointed layer runs again, but stops before its hook.
        assert tokens == (packed if padding_free else joined if "checkpointed" in kind else shared)


def test_the_prompt_is_joined_where_sharing_it_would_be_wrong(group):
    assert forward.can_share_prompt(made("plain")) and forward.can_share_prompt(made("lora ddp"))
    assert not forward.can_share_prompt(made("checkpointed"))
    assert forward.can_share_prompt(made("checkpointed").eval())
    sharded = fully_shard(made("plain"))
    assert not forward.can_share_prompt(sharded)
    with torch.no_grad():
        assert forward.can_share_prompt(sharded)
    sliding = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=4,
    )  # fmt: skip
    assert not forward.can_share_prompt(Gemma2ForCausalLM(sliding))


def test_the_head_skips_the_prompt_under_wrappers_too(group):
    for kind in ("plain", "lora", "ddp", "lora ddp"):
        assert forward.keeps_logits(made(kind)), kind
        assert Policy(made(kind)).device == torch.device("cpu")
