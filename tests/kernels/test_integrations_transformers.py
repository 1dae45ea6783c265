"""Hidden states and head of Hugging Face models against the model's own logits, forward and backward.

Every model is a tiny random one of float32 with weights of order 1, so that its logits reach where a cap bends them.
"""

from __future__ import annotations

import textwrap

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from gem_kernels import token_stats  # noqa: E402
from gem_kernels.integrations import transformers as integration  # noqa: E402
from gem_kernels.integrations.transformers import causal_lm_head, hidden_states_and_head, last_hidden_states  # noqa: E402
from tests.kernels.helpers import assert_near  # noqa: E402
from tests.processes import run_ranks, run_script  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

V, D = 101, 32
SHAPE = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2_SHAPE = {
    "vocab_size": V, "n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.5,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WITHOUT_HEAD_DIM = {key: value for key, value in SHAPE.items() if key != "head_dim"}

# model_type, its configuration, the head expected of it.
ARCHITECTURES = {
    "llama": ("llama", SHAPE, {}),
    "qwen2": ("qwen2", WITHOUT_HEAD_DIM, {}),
    "qwen3": ("qwen3", SHAPE, {}),
    "gemma2": ("gemma2", SHAPE | {"final_logit_softcapping": 30.0}, {"softcap": 30.0}),
    "gemma2_uncapped": ("gemma2", SHAPE | {"final_logit_softcapping": None}, {}),
    "gemma3": ("gemma3_text", SHAPE | {"final_logit_softcapping": 30.0}, {"softcap": 30.0}),
    "mistral": ("mistral", SHAPE, {}),
    "phi3": ("phi3", WITHOUT_HEAD_DIM, {}),
    "gpt2": ("gpt2", GPT2_SHAPE, {}),
    "olmo2": ("olmo2", WITHOUT_HEAD_DIM, {}),
    "cohere": ("cohere", WITHOUT_HEAD_DIM | {"logit_scale": 0.3}, {"logit_scale": 0.3}),
    "cohere2": ("cohere2", SHAPE | {"logit_scale": 0.3}, {"logit_scale": 0.3}),
    "granite": ("granite", WITHOUT_HEAD_DIM | {"logits_scaling": 3.0}, {"logit_scale": 1 / 3}),
    "granitemoe": ("granitemoe", WITHOUT_HEAD_DIM | {"logits_scaling": 3.0}, {"logit_scale": 1 / 3}),
    "vaultgemma": ("vaultgemma", SHAPE | {"final_logit_softcapping": 30.0}, {"softcap": 30.0}),
    "nanochat": ("nanochat", WITHOUT_HEAD_DIM | {"final_logit_softcapping": 15.0}, {"softcap": 15.0}),
    "phi (bias)": ("phi", WITHOUT_HEAD_DIM, {}),
    "gpt_neox (embed_out)": ("gpt_neox", WITHOUT_HEAD_DIM, {}),
}


def build(name: str = "llama", tied: bool = False, seed: int = 0, **extra) -> transformers.PreTrainedModel:
    model_type, shape, _ = ARCHITECTURES[name]
    config = transformers.AutoConfig.for_model(model_type, **shape, tie_word_embeddings=tied, **extra)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        nn.init.normal_(model.get_output_embeddings().bias)
    return model


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """[2, 7] tokens, the second row with two columns of padding on the left."""
    ids = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return ids, mask


# Of a gradient's largest entry: backward through two layers sums in float32, in another order where the head scales.
GRADIENTS = 2.0**-15


def stats_loss(logits: Tensor, ids: Tensor):
    stats = token_stats(logits[:, :-1], ids[:, 1:], backend="torch")
    return stats, (stats.logprobs - 0.3 * stats.entropy).square().mean()


def check(model: nn.Module) -> integration.Head:
    """Stats, and every gradient (that of the hidden states too), from (hidden, head) and from the model's logits."""
    ids, mask = batch()
    seen: list[Tensor] = []

    def keep(_, args):
        if args[0].requires_grad:
            args[0].retain_grad()
        seen.append(args[0])

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    own, loss = stats_loss(model(input_ids=ids, attention_mask=mask).logits, ids)
    hook.remove()
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    hidden, head = hidden_states_and_head(model, ids, mask)
    hidden.retain_grad()
    ours, loss = stats_loss(head.logits(hidden), ids)
    loss.backward()
    assert hidden.shape == (2, 7, D)
    torch.testing.assert_close(hidden, seen[0], rtol=0, atol=0)
    assert_near(ours.logprobs, own.logprobs, what="logprobs")
    assert_near(ours.entropy, own.entropy, what="entropy")
    assert_near(hidden.grad, seen[0].grad, GRADIENTS, "hidden")
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, p in model.named_parameters():
        assert (p.grad is None) == (expected[name] is None), name
        if p.grad is not None:
            assert_near(p.grad, expected[name], GRADIENTS, name, floor=1e-3 * largest)
    return head


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name, tied):
    model = build(name, tied).eval()
    head = check(model)
    expected = {"softcap": None, "logit_scale": 1.0} | ARCHITECTURES[name][2]
    assert (head.softcap, head.logit_scale) == (expected["softcap"], pytest.approx(expected["logit_scale"]))
    assert head.weight is model.get_output_embeddings().weight
    assert head.bias is getattr(model.get_output_embeddings(), "bias", None)
    assert (head.bias is not None) == name.startswith("phi ")
    assert (head.weight is model.get_input_embeddings().weight) == tied


def test_bfloat16():
    for name in ("llama", "gemma2", "granite"):
        model = build(name).bfloat16().eval()
        ids, mask = batch()
        hidden, head = hidden_states_and_head(model, ids, mask)
        own = model(input_ids=ids, attention_mask=mask).logits
        assert_near(head.logits(hidden), own, 2.0**-7, name)


def test_the_head_is_not_run_and_no_logits_are_made():
    model = build().eval()
    causal_lm_head(model)
    calls = []
    model.lm_head.register_forward_hook(lambda *a: calls.append(a))
    with torch.no_grad():
        last_hidden_states(model, batch()[0])
    assert not calls
    model(batch()[0])
    assert len(calls) == 1  # the head is back in its place


def test_options_of_the_forward():
    model = build().eval()
    ids, mask = batch()
    with torch.no_grad():
        full = last_hidden_states(model, ids, mask)
        assert_near(last_hidden_states(model, ids, mask, logits_to_keep=3), full[:, -3:])
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        own = model(ids, attention_mask=mask, position_ids=positions).logits
        hidden, head = hidden_states_and_head(model, ids, mask, positions)
        assert_near(head.logits(hidden), own)
        cache = transformers.DynamicCache(config=model.config)
        last_hidden_states(model, ids[:, :4], mask[:, :4], past_key_values=cache)
        assert cache.get_seq_length() == 4
        rest = last_hidden_states(model, ids[:, 4:], mask, past_key_values=cache)
        assert_near(rest, full[:, 4:])
        embedded = last_hidden_states(model, None, mask, inputs_embeds=model.get_input_embeddings()(ids))
        assert_near(embedded, full)
    with pytest.raises(ValueError, match="labels"):
        last_hidden_states(model, ids, labels=ids)


def test_dropout_neither_disturbs_the_check_nor_is_disturbed_by_it():
    model = build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    model.transformer.h[0].eval()  # a flag that train() would not restore
    flags = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    causal_lm_head(model)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert {name: module.training for name, module in model.named_modules()} == flags


def test_gradient_checkpointing():
    model = build("gemma2")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    check(model.train())


def test_autocast_around_the_forward():
    """As accelerate does it: the forward runs in bfloat16, its outputs come back in float32."""
    model = build("gemma2").eval()
    forward = model.forward

    def autocast(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            output = forward(*args, **kwargs)
        output.logits = output.logits.float()
        return output

    model.forward = autocast
    ids, mask = batch()
    hidden, head = hidden_states_and_head(model, ids, mask)
    own = model(input_ids=ids, attention_mask=mask).logits
    assert_near(head.logits(hidden.float()), own, 2.0**-6)


class SquashedLlama(transformers.LlamaForCausalLM):
    """A cap of which the configuration says nothing."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 30.0 * torch.tanh(output.logits / 30.0)
        return output


class TwiceLlama(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


class TestUnknownHeads:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("initializer_range", [0.5, 0.001])  # at 0.001 the model's logits never reach the cap
    def test_extra_nonlinearity(self, dtype, initializer_range):
        model = SquashedLlama(transformers.LlamaConfig(**SHAPE | {"initializer_range": initializer_range})).to(dtype)
        for _ in range(2):  # a failure is not remembered as a success
            with pytest.raises(
                ValueError, match=r"unknown head: SquashedLlama \(model_type 'llama'\).*differ by up to"
            ):
                causal_lm_head(model)
        with pytest.raises(ValueError, match="unknown head"):
            hidden_states_and_head(model, batch()[0])
        assert isinstance(model.lm_head, nn.Linear)

    def test_scale_the_table_does_not_know(self, monkeypatch):
        monkeypatch.setattr(integration, "DIVIDED", set())
        with pytest.raises(ValueError, match="unknown head: GraniteForCausalLM"):
            causal_lm_head(build("granite"))

    def test_configuration_changed_after_the_check(self):
        model = build("cohere")
        causal_lm_head(model)
        model.config.logit_scale = 0.31  # the model keeps a copy of its own
        with pytest.raises(ValueError, match="unknown head"):
            causal_lm_head(model)

    def test_head_changed_after_the_check(self):
        model = build()
        causal_lm_head(model)
        model.lm_head.register_forward_hook(lambda module, args, output: output.cos())
        with pytest.raises(ValueError, match="unknown head"):
            causal_lm_head(model)

    def test_head_called_twice(self):
        model = TwiceLlama(transformers.LlamaConfig(**SHAPE))
        with pytest.raises(ValueError, match="calls its output embeddings once, got 2"):
            last_hidden_states(model, batch()[0])

    def test_head_of_another_type(self):
        class Doubled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        model = build()
        model.lm_head = Doubled(D, V, bias=False)
        with pytest.raises(ValueError, match=r"plain nn\.Linear.*Doubled"):
            causal_lm_head(model)

    @pytest.mark.parametrize(
        "wrap",
        [lambda m: nn.Sequential(m), lambda m: m.model, lambda m: torch.compile(m), nn.DataParallel],
        ids=["sequential", "base model", "compiled", "data parallel"],
    )
    def test_other_modules(self, wrap):
        with pytest.raises(ValueError, match="`model` must be a transformers causal LM"):
            hidden_states_and_head(wrap(build()), batch()[0])

    def test_compiled_in_place(self):
        model = build()
        model.compile()
        with pytest.raises(ValueError, match="not compiled as a whole"):
            causal_lm_head(model)

    def test_on_the_meta_device(self):
        with pytest.raises(ValueError, match="meta"):
            causal_lm_head(build().to("meta"))


class TestPeft:
    @pytest.fixture(autouse=True)
    def _peft(self):
        self.peft = pytest.importorskip("peft")

    def lora(self, model, **options):
        config = self.peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False} | options)
        return self.peft.get_peft_model(model, config)

    @pytest.mark.parametrize("tied", [False, True])
    def test_lora(self, tied):
        model = self.lora(build("qwen2", tied), target_modules=["q_proj", "v_proj"]).eval()
        head = check(model)
        assert not head.weight.requires_grad
        with model.disable_adapter():
            ids, mask = batch()
            hidden, head = hidden_states_and_head(model, ids, mask)
            assert_near(head.logits(hidden), model(input_ids=ids, attention_mask=mask).logits)

    def test_modules_to_save(self):
        model = self.lora(build("granite"), target_modules=["q_proj"], modules_to_save=["lm_head"]).eval()
        wrapper = model.get_base_model().lm_head
        with torch.no_grad():
            wrapper.modules_to_save["default"].weight.mul_(1.5)
        assert check(model).weight is wrapper.modules_to_save["default"].weight
        with model.disable_adapter():
            assert causal_lm_head(model).weight is wrapper.original_module.weight

    def test_lora_on_the_head_is_refused_until_merged_or_disabled(self):
        model = self.lora(build("llama"), target_modules=["q_proj", "lm_head"]).eval()
        with pytest.raises(ValueError, match=r"keep lm_head out of target_modules, or merge.*peft\.tuners\.lora"):
            hidden_states_and_head(model, batch()[0])
        ids, mask = batch()
        with model.disable_adapter():
            hidden, head = hidden_states_and_head(model, ids, mask)
            assert_near(head.logits(hidden), model(input_ids=ids, attention_mask=mask).logits)
        model.merge_adapter()
        hidden, head = hidden_states_and_head(model, ids, mask)
        assert_near(head.logits(hidden), model(input_ids=ids, attention_mask=mask).logits)

    def test_trainable_tokens_of_a_tied_head_are_refused(self):
        model = self.lora(build("qwen2", tied=True), target_modules=["q_proj"], trainable_token_indices=[5, 6])
        with pytest.raises(ValueError, match="TrainableTokensWrapper"):
            causal_lm_head(model)

    def test_prompt_tuning_is_refused(self):
        config = self.peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = self.peft.get_peft_model(build(), config)
        with pytest.raises(ValueError, match="no prompt tuning"):
            last_hidden_states(model, *batch())


# Both processes see other tokens; the mean of their gradients is that of one process with both batches.
DISTRIBUTED = """
import warnings
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from tests.kernels import test_integrations_transformers as t

warnings.filterwarnings("error", message=".*view tensor.*")
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()


def expected(name, tied):
    model, grads = t.build(name, tied).eval(), {}
    for r in range(world):
        ids, mask = t.batch(r)
        t.stats_loss(model(input_ids=ids, attention_mask=mask).logits, ids)[1].div(world).backward()
    return model, {k: p.grad for k, p in model.named_parameters()}


def step(model):
    ids, mask = t.batch(rank)
    hidden, head = t.hidden_states_and_head(model, ids, mask)
    logits = head.logits(hidden)
    t.stats_loss(logits, ids)[1].backward()
    return logits


def compare(case, model, reference, grads, logits, times=1):
    ids, mask = t.batch(rank)
    t.assert_near(logits, reference(input_ids=ids, attention_mask=mask).logits, what=case)
    largest = max(float(g.abs().max()) for g in grads.values())
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        t.assert_near(grad, times * grads[name], t.GRADIENTS, f"{case} {name}", floor=1e-3 * largest)
    model.zero_grad()
    print(case, "ok", flush=True)


for tied in (False, True):
    reference, grads = expected("gemma2", tied)
    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
        model = t.build("gemma2", tied).eval()
        ddp = DDP(model, **options)
        for _ in range(3):
            compare(f"ddp {options} tied={tied}", model, reference, grads, step(ddp))
        if not options:
            with ddp.no_sync():
                step(ddp)
            compare(f"ddp no_sync tied={tied}", model, reference, grads, step(ddp), times=2)
    for case in ("root", "root resharded", "head alone", "norm and head"):
        model = t.build("gemma2", tied).eval()
        if case in ("head alone", "norm and head") and tied:
            continue  # FSDP2 shares parameters within one group only
        for layer in model.model.layers:
            fully_shard(layer)
        if case == "head alone":
            fully_shard(model.lm_head)
        if case == "norm and head":
            fully_shard([model.model.norm, model.lm_head])
        fully_shard(model, reshard_after_forward=True if case == "root resharded" else None)
        for _ in range(2):
            compare(f"fsdp2 {case} tied={tied}", model, reference, grads, step(model))
        model.set_requires_gradient_sync(False)
        step(model)
        model.set_requires_gradient_sync(True)
        compare(f"fsdp2 accumulated {case} tied={tied}", model, reference, grads, step(model), times=2)
        with torch.no_grad():
            ids, mask = t.batch(rank)
            hidden, head = t.hidden_states_and_head(model, ids, mask)
            compare(f"fsdp2 no_grad {case}", torch.nn.Module(), reference, grads, head.logits(hidden))
        compare(f"fsdp2 after no_grad {case}", model, reference, grads, step(model))

model = t.build("llama").eval()
fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32))
ids, mask = t.batch(rank)
hidden, head = t.hidden_states_and_head(model, ids, mask)
assert hidden.dtype == head.weight.dtype == torch.bfloat16, (hidden.dtype, head.weight.dtype)
own = model(input_ids=ids, attention_mask=mask).logits
t.assert_near(head.logits(hidden).float(), own, 2.0**-7)
print("fsdp2 mixed precision ok", flush=True)

mesh = init_device_mesh("cpu", (world,))
model = t.build("llama")
model.lm_head.weight = torch.nn.Parameter(distribute_tensor(model.lm_head.weight.data, mesh, [Shard(0)]))
try:
    t.causal_lm_head(model)
except ValueError as error:
    assert "no tensor parallelism" in str(error)
else:
    raise AssertionError("a tensor-parallel head was accepted")

squashed = t.SquashedLlama(t.transformers.LlamaConfig(**t.SHAPE))
try:
    t.hidden_states_and_head(DDP(squashed), ids)
except ValueError as error:
    assert "unknown head" in str(error)
else:
    raise AssertionError("an unknown head was accepted")
dist.destroy_process_group()
print("done", flush=True)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_distributed(tmp_path):
    """DistributedDataParallel and FSDP2, two gloo processes."""
    script = tmp_path / "distributed.py"
    script.write_text(textwrap.dedent(DISTRIBUTED))
    output = run_ranks(2, run_script, script, environment={"GLOO_SOCKET_IFNAME": "lo"})
    assert output.split("\n").count("done") == 2
