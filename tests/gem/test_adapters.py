"""LoRA and QLoRA: what trains, what is saved and how it opens again; settings that cannot be had are one clear line."""

import io
import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gem.checkpoint import states
from gem.config.read import build_config
from gem.config.settings import Lora
from gem.demo.arithmetic import arithmetic_pairs
from gem.errors import UserError
from gem.files import write_jsonl
from gem.loop import train
from gem.model.load import (
    find_attention,
    load_model,
    load_model_config,
    load_model_for_training,
    load_tokenizer,
    save_pretrained,
)
from gem.model.lora import add_lora, is_adapted, is_untouched, merged_state_dict
from gem.model.source import find_model
from tests.helpers import save_tiny, tiny_model, tiny_tokenizer, write_gguf
from tests.kernels.helpers import assert_near

IDS = torch.tensor([tiny_tokenizer().encode("2 + 2 = 4")])


def settings(**values):
    return build_config({"model": "m", "train_file": "t", "output_dir": "o", "device": "cpu", **values})


def disturbed(model):
    """The adapter as some steps of training might leave it."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def test_lora_trains_the_adapter_alone_and_not_the_head():
    model = add_lora(tiny_model(), Lora(lora_r=4))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert not any("lm_head" in name or "embed" in name for name in trained)
    assert {name.split(".")[-4] for name in trained} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    few = add_lora(tiny_model(), Lora(lora_target_modules="q_proj, v_proj"))
    assert {n.split(".")[-4] for n, p in few.named_parameters() if p.requires_grad} == {"q_proj", "v_proj"}


def test_untouched_until_b_moves():
    model = add_lora(tiny_model(), Lora())
    assert is_adapted(model) and is_untouched(model)
    assert torch.equal(model(IDS).logits, tiny_model()(IDS).logits)
    assert not is_untouched(disturbed(model))
    assert not is_adapted(tiny_model()) and not is_untouched(tiny_model())


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ("lm_head", "output head"),
        ("q_proj,lm_head", "output head"),
        ("queries", "no 'queries'.*down_proj"),
        (",", "got n"),
    ],
)
def test_wrong_targets_are_refused(targets, words):
    with pytest.raises(UserError, match=f"lora_target_modules: .*{words}"):
        add_lora(tiny_model(), Lora(lora_target_modules=targets))


def test_an_adapter_is_saved_and_opens_with_every_loader(tmp_path):
    base = save_tiny(tmp_path / "base")
    source = find_model(str(base))
    config = settings(use_peft=True, lora_r=2, gradient_checkpointing=True)
    model = disturbed(load_model_for_training(source, load_model_config(source), config))
    logits = model(IDS).logits
    assert not torch.allclose(logits, tiny_model()(IDS).logits, atol=1e-3)
    save_pretrained(model, load_tokenizer(source), tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    for loader in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        torch.testing.assert_close(loader.from_pretrained(tmp_path / "saved")(IDS).logits, logits)

    saved = find_model(str(tmp_path / "saved"))
    assert saved.name == str(base) and saved.adapter == str(tmp_path / "saved")
    assert load_tokenizer(saved).chat_template == tiny_tokenizer().chat_template
    merged = load_model(saved, load_model_config(saved), device="cpu")
    assert not is_adapted(merged) and all(p.requires_grad for p in merged.parameters())
    assert_near(merged(IDS).logits, logits)
    # A run on top of it goes on with the same adapter.
    again = load_model_for_training(saved, load_model_config(saved), config)
    torch.testing.assert_close(again(IDS).logits, logits)
    assert any(p.requires_grad for p in again.parameters()) and not is_untouched(again)


def test_under_a_gguf_file_the_merged_weights_are_saved(tmp_path):
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "tiny.gguf", tiny_model(), tiny_tokenizer())
    source = find_model(str(tmp_path / "gguf"))
    model = disturbed(load_model_for_training(source, load_model_config(source), settings(use_peft=True)))
    before = {name: p.clone() for name, p in model.named_parameters()}
    save_pretrained(model, load_tokenizer(source), tmp_path / "saved")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert set(merged_state_dict(model)) == set(model.get_base_model().__class__(model.config).state_dict())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_near(opened(IDS).logits, model(IDS).logits)


def test_foreign_adapters_are_refused(tmp_path):
    save_tiny(tmp_path / "base")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x", "peft_type": "PREFIX_TUNING"}))
    with pytest.raises(UserError, match="expected a LoRA adapter, got PREFIX_TUNING"):
        find_model(str(bad))
    (bad / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x", "peft_type": "LORA"}))
    (bad / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match="safetensors only"):
        find_model(str(bad))
    (bad / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read it") as error:
        find_model(str(bad))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"use_liger_kernel": True}, "use_liger_kernel: needs a CUDA device and liger-kernel"),
        ({"padding_free": True}, "padding_free: .*flash-attn"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation: flash_attention_2 needs"),
        ({"attn_implementation": "flash_attention_3"}, "attn_implementation: flash_attention_3 needs .*flash-attn-3"),
        ({"attn_implementation": "kernels-community/flash-attn"}, "attn_implementation: expected auto, sdpa"),
        ({"use_peft": True, "lora_target_modules": "lm_head"}, "lora_target_modules: lm_head is the output head"),
        ({"device": "cuda:7"}, "device: cannot use 'cuda:7'"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without CUDA")
def test_what_cannot_be_had_is_one_line(values, words, tmp_path):
    source = find_model(str(save_tiny(tmp_path / "base")))
    with pytest.raises(UserError, match=words) as error:
        load_model_for_training(source, load_model_config(source), settings(**values))
    assert "\n" not in str(error.value)


QLORA = {"use_peft": True, "load_in_4bit": True, "lora_r": 4}


@pytest.fixture
def bitsandbytes(monkeypatch):
    """bitsandbytes as on a CPU with AVX512-BF16, which has a layout of its own for inference."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if "cpu" not in getattr(bitsandbytes, "supported_torch_devices", ()):
        pytest.skip("this bitsandbytes has no CPU kernels")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    return bitsandbytes


def save_wide(directory):
    """The tiny model with rows of 64 and 128 weights, which the CPU kernels can decode; its head is tied."""
    save_tiny(directory)
    config = LlamaConfig.from_pretrained(directory, hidden_size=64, intermediate_size=128, head_dim=16)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def packed_weights(model):
    """The layers in 4 bits by the names of their modules under peft."""
    layers = {name.removesuffix(".base_layer"): m for name, m in model.named_modules() if name.endswith(".base_layer")}
    return {name: layer for name, layer in layers.items() if type(layer.weight).__name__ == "Params4bit"}


def decoded(module):
    """The weights that the 4 bits of a layer stand for, by NF4's table in plain torch."""
    state = module.weight.quant_state
    scales = state.state2.code[state.absmax.long()] * state.state2.absmax.repeat_interleave(256)[: state.absmax.numel()]
    packed = module.weight.data.flatten()
    values = state.code[torch.stack([packed >> 4, packed & 15], 1).flatten().long()]
    return (values.view(-1, state.blocksize) * (scales + state.offset)[:, None]).view(state.shape)


def gradients(model):
    """d log p(IDS) / d adapter, in training mode."""
    model.train().zero_grad()
    torch.nn.functional.cross_entropy(model(IDS[:, :-1]).logits[0].float(), IDS[0, 1:]).backward()
    model.eval()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_4bit_model_computes_with_its_4bit_weights_before_and_after_an_evaluation(bitsandbytes, tmp_path):
    source = find_model(str(save_wide(tmp_path / "base")))
    model = disturbed(load_model_for_training(source, load_model_config(source), settings(**QLORA)))
    packed = packed_weights(model)
    assert len(packed) == 14 and {m.weight.dtype for m in packed.values()} == {torch.uint8}
    assert {m.weight.quant_state.quant_type for m in packed.values()} == {"nf4"}
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32} and all("lora_" in name for name in trained)

    # The same in 16 bits, with the values that the 4 bits stand for: NF4's values are up to 0.152 of a block's largest
    # weight away, and its scales are rounded in turn.
    truth, plain = (
        load_model_for_training(source, load_model_config(source), settings(use_peft=True, lora_r=4, dtype=dtype))
        for dtype in ("float32", "bfloat16")
    )
    for other in (truth, plain):
        layers = dict(other.named_modules())
        for name, module in packed.items():
            original, weight = layers[name].base_layer.weight, decoded(module)
            error, largest = (weight - original).abs().view(-1, 64), original.abs().view(-1, 64).amax(1, keepdim=True)
            assert 0.1 < (error / largest).max() < 0.17
            original.data = weight.to(original.dtype)
        other.load_state_dict({n: p for n, p in model.state_dict().items() if "lora_" in n}, strict=False)

    first, before = gradients(model), {name: module.weight.data.clone() for name, module in packed.items()}
    with torch.no_grad():
        logits, expected, in_16_bits = (m(IDS).logits.float() for m in (model, truth, plain))
    assert (logits - expected).norm() < 2 * (in_16_bits - expected).norm()
    after = gradients(model)
    assert first.keys() == after.keys() and all(torch.equal(first[name], after[name]) for name in first)
    assert all(torch.equal(module.weight.data, before[name]) for name, module in packed.items())
    expected, in_16_bits = gradients(truth), gradients(plain)
    assert first.keys() == expected.keys() and len(first) == 28
    for name, gradient in first.items():
        assert (gradient - expected[name]).norm() < 2 * (in_16_bits[name] - expected[name]).norm(), name


def test_a_4bit_run_trains_saves_and_continues_exactly(bitsandbytes, tmp_path):
    save_wide(tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", arithmetic_pairs(12))
    paths = {"model": tmp_path / "model", "train_file": tmp_path / "pairs.jsonl", "output_dir": tmp_path / "run"}
    config = settings(
        num_generations=2, max_completion_length=6, max_steps=3, prompts_per_step=2, micro_batch_size=2, save_steps=2,
        sft_batch_size=5, sft_learning_rate=1e-2, learning_rate=1e-3, eval_generate=1, eval_sample=1, beta=0.1,
        num_iterations=2, epsilon=0.2, lora_dropout=0.1, **QLORA, **{name: str(path) for name, path in paths.items()},
    )  # fmt: skip
    run_dir, adapter = tmp_path / "run", tmp_path / "run" / "model" / "adapter_model.safetensors"

    def metrics():
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k not in ("step_time", "eval/seconds")} for row in rows]

    train(config, Console(file=io.StringIO()))
    rows, weights = metrics(), adapter.read_bytes()
    losses = [row["loss"] for row in rows if row["stage"] == "SFT"]
    steps = [row for row in rows if row["stage"] == "SEGA"]
    assert losses[-1] < losses[0] and len(steps) == 3 and all(row["grad_norm"] > 0 for row in steps)
    # From the starting policy, the adapter after SFT: at first rounding alone.
    assert steps[0]["kl"] < 1e-4 * steps[-1]["kl"]

    shutil.rmtree(states.checkpoints(run_dir)[-1])  # as if it had been cut off after the one before
    shutil.rmtree(run_dir / "model")
    train(config, Console(file=io.StringIO()), resume=True)
    assert metrics() == rows and adapter.read_bytes() == weights
    assert not (run_dir / "model" / "model.safetensors").exists()

    saved = find_model(str(run_dir / "model"))
    again = load_model_for_training(saved, load_model_config(saved), config)
    opened = AutoPeftModelForCausalLM.from_pretrained(run_dir / "model")
    ours, theirs = (
        {name: p for name, p in m.named_parameters() if "lora_" in name and p.abs().max() > 0} for m in (again, opened)
    )
    assert len(ours) == 28 and all(torch.equal(p, theirs[name]) for name, p in ours.items())
    assert torch.isfinite(load_model(saved, load_model_config(saved), device="cpu")(IDS).logits).all()
    # Where the base is gone there are no whole weights to save in its place.
    shutil.rmtree(tmp_path / "model")
    save_pretrained(again, tiny_tokenizer(), tmp_path / "orphan")
    assert (tmp_path / "orphan" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "orphan" / "model.safetensors").exists()


def test_4bit_weights_need_bitsandbytes_a_device_of_its_and_no_gguf(monkeypatch, tmp_path):
    source = find_model(str(save_tiny(tmp_path / "base")))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="load_in_4bit: needs bitsandbytes: pip"):
        patch.setattr("importlib.util.find_spec", lambda name, *_: None)
        load_model_for_training(source, load_model_config(source), settings(**QLORA))
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if "cpu" in getattr(bitsandbytes, "supported_torch_devices", ()):
        with pytest.raises(UserError, match=r"load_in_4bit: .*multiple of 64 weights only, and model\..* has 32"):
            load_model_for_training(source, load_model_config(source), settings(**QLORA))
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda", "xpu"}, raising=False)
    with pytest.raises(UserError, match="load_in_4bit: bitsandbytes has no kernels for cpu, only for cuda, xpu"):
        load_model_for_training(source, load_model_config(source), settings(**QLORA))
    monkeypatch.undo()
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "tiny.gguf", tiny_model(), tiny_tokenizer())
    source = find_model(str(tmp_path / "gguf"))
    with pytest.raises(UserError, match="load_in_4bit: a GGUF file cannot be quantized again"):
        load_model_for_training(source, load_model_config(source), settings(**QLORA))


def test_attention_by_what_is_installed(tmp_path, monkeypatch):
    assert find_attention("auto", "bfloat16", "cpu") is None
    assert find_attention("eager", "float32", "cpu") == "eager"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "flash_attn" else None)
    assert find_attention("auto", "bfloat16", "cuda") == "flash_attention_2"
    assert find_attention("auto", "bfloat16", "cpu") is None
    assert find_attention("flash_attention_2", "bfloat16", "cuda") == "flash_attention_2"
    with pytest.raises(UserError, match="flash_attention_3 needs"):  # another package
        find_attention("flash_attention_3", "bfloat16", "cuda")
    assert find_attention("auto", "float32", "cuda") is None  # flash-attn computes in 16 bits only
    source = find_model(str(save_tiny(tmp_path / "base")))
    for name, expected in (("auto", "sdpa"), ("eager", "eager")):
        model = load_model_for_training(source, load_model_config(source), settings().changed(attn_implementation=name))
        assert model.config._attn_implementation == expected
