"""LoRA: what trains, what is saved and how it opens again; settings that cannot be had are one clear line."""

import dataclasses
import json

import pytest
import torch
from gem_tiny import save_tiny, tiny_model, tiny_tokenizer
from peft import AutoPeftModelForCausalLM
from test_gem_model import write_gguf
from transformers import AutoModelForCausalLM

from gem.adapters import Lora, add_lora, is_adapted, is_untouched, merged_state_dict
from gem.config import build_config
from gem.errors import UserError
from gem.model import (
    find_attention,
    find_model,
    load_config,
    load_model,
    load_model_for_training,
    load_tokenizer,
    save_pretrained,
)

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
    model = add_lora(tiny_model(), Lora(r=4))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert not any("lm_head" in name or "embed" in name for name in trained)
    assert {name.split(".")[-4] for name in trained} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    few = add_lora(tiny_model(), Lora(target_modules="q_proj, v_proj"))
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
        add_lora(tiny_model(), Lora(target_modules=targets))


def test_an_adapter_is_saved_and_opens_with_every_loader(tmp_path):
    base = save_tiny(tmp_path / "base")
    source = find_model(str(base))
    config = settings(use_peft=True, lora_r=2, gradient_checkpointing=True)
    model = disturbed(load_model_for_training(source, load_config(source), config))
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
    merged = load_model(saved, load_config(saved), device="cpu")
    assert not is_adapted(merged) and all(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    # A run on top of it goes on with the same adapter.
    again = load_model_for_training(saved, load_config(saved), config)
    torch.testing.assert_close(again(IDS).logits, logits)
    assert any(p.requires_grad for p in again.parameters()) and not is_untouched(again)


def test_under_a_gguf_file_the_merged_weights_are_saved(tmp_path):
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "tiny.gguf", tiny_model(), tiny_tokenizer())
    source = find_model(str(tmp_path / "gguf"))
    model = disturbed(load_model_for_training(source, load_config(source), settings(use_peft=True)))
    before = {name: p.clone() for name, p in model.named_parameters()}
    save_pretrained(model, load_tokenizer(source), tmp_path / "saved")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert set(merged_state_dict(model)) == set(model.get_base_model().__class__(model.config).state_dict())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(opened(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


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
        ({"load_in_4bit": True, "use_peft": True}, "load_in_4bit: needs a CUDA device and bitsandbytes"),
        ({"use_liger_kernel": True}, "use_liger_kernel: needs a CUDA device and liger-kernel"),
        ({"padding_free": True}, "padding_free: .*flash-attn"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation: flash_attention_2 needs"),
        ({"attn_implementation": "kernels-community/flash-attn"}, "attn_implementation: expected auto, sdpa"),
        ({"use_peft": True, "lora_target_modules": "lm_head"}, "lora_target_modules: lm_head is the output head"),
        ({"device": "cuda:7"}, "device: cannot use 'cuda:7'"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without CUDA")
def test_what_cannot_be_had_is_one_line(values, words, tmp_path):
    source = find_model(str(save_tiny(tmp_path / "base")))
    with pytest.raises(UserError, match=words) as error:
        load_model_for_training(source, load_config(source), settings(**values))
    assert "\n" not in str(error.value)


def test_attention_by_what_is_installed(tmp_path, monkeypatch):
    assert find_attention("auto", "bfloat16", "cpu") is None
    assert find_attention("eager", "float32", "cpu") == "eager"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "flash_attn" else None)
    assert find_attention("auto", "bfloat16", "cuda") == "flash_attention_2"
    assert find_attention("auto", "bfloat16", "cpu") is None
    assert find_attention("auto", "float32", "cuda") is None  # flash-attn computes in 16 bits only
    source = find_model(str(save_tiny(tmp_path / "base")))
    for name, expected in (("auto", "sdpa"), ("eager", "eager")):
        model = load_model_for_training(
            source, load_config(source), dataclasses.replace(settings(), attn_implementation=name)
        )
        assert model.config._attn_implementation == expected
