"""Models: where they are found, how GGUF comes in and safetensors goes out, and which tokens end an answer."""

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers import modeling_flash_attention_utils as flash_attention

from gem.errors import UserError
from gem.model import forward
from gem.model.checks import check_there
from gem.model.forward import Policy
from gem.model.load import (
    checkpoint_activations,
    context_length,
    end_token_ids,
    load_model,
    load_model_config,
    load_tokenizer,
    save_pretrained,
)
from gem.model.source import ModelSource, find_model
from tests.helpers import rollout_of, save_tiny, tiny_model, tiny_tokenizer, write_gguf
from tests.kernels.helpers import assert_near
from tests.processes import Fork, run_script


def test_gguf_in_safetensors_out(tmp_path):
    (tmp_path / "gguf").mkdir()
    model = tiny_model()
    write_gguf(tmp_path / "gguf" / "tiny.gguf", model, tiny_tokenizer())
    source = find_model(str(tmp_path / "gguf"))
    assert source == find_model(str(tmp_path / "gguf" / "tiny.gguf"))
    config = load_model_config(source)
    assert context_length(config) == 512
    loaded, tokenizer = load_model(source, config, device="cpu"), load_tokenizer(source)
    ids = torch.tensor([tiny_tokenizer().encode("2 + 2 = 4")])
    assert_near(loaded(ids).logits, model(ids).logits)
    assert tokenizer.decode(tokenizer.encode("Final Answer: 漢4")) == "Final Answer: 漢4"
    assert tokenizer.eos_token_id == tiny_tokenizer().eos_token_id

    save_pretrained(loaded, tokenizer, tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, loaded(ids).logits)
    assert load_tokenizer(find_model(str(tmp_path / "saved"))).chat_template == tokenizer.chat_template


def test_every_end_token_counts():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    eos = tokenizer.eos_token_id
    assert end_token_ids(model, tokenizer) == (eos,)
    model.generation_config.eos_token_id = [3, 7]
    model.config.eos_token_id = 5
    assert end_token_ids(model, tokenizer, 9) == tuple(sorted([3, 5, 7, 9, eos]))
    model.generation_config.eos_token_id = None
    assert end_token_ids(model, tokenizer) == tuple(sorted([5, eos]))


def test_where_a_model_is(tmp_path):
    save_tiny(tmp_path / "model")
    assert find_model(str(tmp_path / "model")) == ModelSource(str(tmp_path / "model"), None)
    assert find_model("owner/name") == ModelSource("owner/name", None)
    assert find_model("owner/name").arguments == {"trust_remote_code": False}
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).touch()
    with pytest.raises(UserError, match=r"2 \.gguf files"):
        find_model(str(tmp_path / "two"))
    with pytest.raises(UserError, match="no such file"):
        find_model(str(tmp_path / "none"))
    (tmp_path / "weights.bin").touch()
    with pytest.raises(UserError, match=r"expected a directory or a \.gguf file"):
        find_model(str(tmp_path / "weights.bin"))


def test_pickled_weights_are_refused(tmp_path):
    save_tiny(tmp_path / "model")
    torch.save(tiny_model().state_dict(), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    source = find_model(str(tmp_path / "model"))
    with pytest.raises(UserError, match="cannot load") as error:
        load_model(source, load_model_config(source), device="cpu")
    assert "\n" not in str(error.value)


def test_a_broken_gguf_is_one_line(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(UserError, match=r"cannot load .*x\.gguf") as error:
        load_tokenizer(find_model(str(tmp_path / "x.gguf")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [HfHubHTTPError.__bases__[0]("no name"), HFValidationError("not\nan id")])
def test_a_name_that_is_nowhere_is_told_at_once(tmp_path, monkeypatch, error):
    """One request to the hub, no twelve; what stands here or was loaded before takes none."""
    asked = []

    def model_info(self, name, timeout):
        asked.append(name)
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("gem.model.load.AutoTokenizer", None)  # nothing asks in another way
    with pytest.raises(UserError) as found:
        load_tokenizer(find_model("modle"))
    words = "model: no file or directory modle here, and as a hub id it cannot be loaded: "
    assert str(found.value) == words + " ".join(str(error).split()) and asked == ["modle"]
    check_there(str(save_tiny(tmp_path / "model")))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: f"cache/{name}/{file}")
    check_there("modle")
    assert asked == ["modle"]


def test_no_network_is_told_at_once(monkeypatch):
    """The client itself, whatever it is made with, where there is no hub."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="no file or directory modle here"):
        check_there("modle")


def test_another_answer_of_the_hub_is_left_to_loading(monkeypatch):
    def model_info(self, name, timeout):
        raise OfflineModeIsEnabled("HF_HUB_OFFLINE")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    check_there("org/model")


class FlashAttention:
    """flash-attn's two functions in plain torch; `calls` has (cu_seqlens, longest) of each packed one."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(flash_attention, "_loaded_implementation", "flash_attention_2")
        monkeypatch.setattr(flash_attention, "_flash_fn", self.whole)
        monkeypatch.setattr(flash_attention, "_flash_varlen_fn", self.packed)
        process = flash_attention._lazy_define_process_function(self.packed)
        monkeypatch.setattr(flash_attention, "_process_flash_kwargs_fn", process)

    def whole(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        output = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, scale=softmax_scale, is_causal=causal, enable_gqa=True
        )
        return output.transpose(1, 2)

    def packed(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False,
    ):  # fmt: skip
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and int(max_seqlen_q) == int(max_seqlen_k)
        assert cu_seqlens_q.dtype == torch.int32 and causal and dropout_p == 0
        self.calls.append((cu_seqlens_q.tolist(), int(max_seqlen_q)))
        bounds = zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist())
        parts = [
            self.whole(*(x[None, start:end] for x in (q, k, v)), softmax_scale=softmax_scale, causal=causal)[0]
            for start, end in bounds
        ]
        return torch.cat(parts)


def tiny_qwen2():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("make", [tiny_model, tiny_qwen2])
def test_padding_free_tells_flash_attention_where_the_sequences_end(make, checkpointed, monkeypatch):
    batch = rollout_of(num_prompts=3, size=3).batch

    def run(attention, padding_free):
        model = make().train()
        if checkpointed:
            checkpoint_activations(model)
        model.config._attn_implementation = attention
        stats = forward.completion_stats(Policy(model, padding_free), batch)
        (stats.logprobs * torch.linspace(-1, 1, stats.logprobs.numel()).view_as(stats.logprobs)).sum().backward()
        return stats, {name: p.grad for name, p in model.named_parameters()}

    padded, gradients = run("eager", False)
    flash = FlashAttention(monkeypatch)
    packed, packed_gradients = run("flash_attention_2", True)
    assert_near(packed.logprobs, padded.logprobs)
    assert_near(packed.entropy, padded.entropy)
    for name, gradient in packed_gradients.items():
        expected = gradients[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    # Each completion behind its prompt, without its last token, which predicts nothing.
    lengths = batch.prompt_mask.sum(1).repeat_interleave(3) + batch.lengths - 1
    assert len(set(lengths.tolist())) > 1
    expected = ([0, *lengths.cumsum(0).tolist()], int(lengths.max()))
    ours = [call for call in flash.calls if len(call[0]) == 10]
    assert ours == [expected] * (4 if checkpointed else 2)  # two layers, and again in a checkpointed backward


# Triton's interpreter lacks two things that Liger's norm uses: numbers that are tensors, and libdevice's rsqrt.
LIGER = """
import copy
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from tests.interpreter import patch_once_a_launch

patch_once_a_launch()
convert = interpreter._implicit_cvt

def converted(value):
    if isinstance(value, float):
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
    return convert(value)

interpreter._implicit_cvt = converted

import liger_kernel.ops.rms_norm
import liger_kernel.ops.rope
from transformers import AutoConfig, AutoModelForCausalLM
from gem.model.load import _apply_liger
from gem_kernels import linear_token_stats
from gem_kernels.integrations.transformers import hidden_states_and_head

liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.rsqrt(x)
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0

def run(model):
    # The log-probs by the model's head, its logits, and the gradients of both.
    model.zero_grad()
    hidden, head = hidden_states_and_head(model, IDS, MASK, (MASK.cumsum(1) - 1).clamp_min(0))
    logprobs = linear_token_stats(hidden[:, 3:-1], head.weight, IDS[:, 4:]).logprobs
    logits = model(input_ids=IDS, attention_mask=MASK).logits[:, 3:]
    (logprobs.sum() + (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()).backward()
    return logprobs.detach(), logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

for kind in ("llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3", "olmo2"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.3, bos_token_id=None,
        eos_token_id=1, pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).train()
    plain = run(model)
    forward = type(model).forward
    _apply_liger(model)
    assert model.forward.__func__ is forward, kind  # the head is left alone
    changed = {type(m).__name__ for m in model.modules() if "liger" in m.forward.__module__}
    assert any("Norm" in name for name in changed) and any("MLP" in name for name in changed), (kind, changed)
    liger = run(model)
    for ours, theirs in zip(plain[:2], liger[:2]):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5 * float(ours.abs().max()))
    assert any(not torch.equal(liger[2][name], gradient) for name, gradient in plain[2].items()), kind
    for name, gradient in plain[2].items():
        assert (liger[2][name] - gradient).norm() < 1e-4 * gradient.norm(), (kind, name)
    print(kind, sorted(changed))
"""


def test_ligers_layers_compute_what_the_models_own_do(tmp_path):
    """Under Triton's interpreter, in a process of its own: Liger changes functions of transformers for good."""
    pytest.importorskip("liger_kernel")
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    (tmp_path / "liger.py").write_text(LIGER)
    fork = Fork(run_script, tmp_path / "liger.py", environment=environment).wait()
    assert fork.returncode == 0, fork.output
    assert len(fork.stdout.splitlines()) == 7
