"""Models that are not what they seem: each is refused with one line that names what is wrong with it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from gem.config.settings import Lora, TextSettings
from gem.errors import UserError
from gem.model.checks import check_causal
from gem.model.load import find_attention, find_device, load_model, load_model_config, save_pretrained
from gem.model.lora import add_lora
from gem.model.opened import open_model, open_text
from gem.model.source import find_model
from tests.helpers import save_tiny, tiny_model, tiny_tokenizer

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture(scope="module")
def adapter(saved, tmp_path_factory):
    torch.manual_seed(0)
    model = add_lora(open_model(str(saved), TextSettings()).policy("cpu")[0].model, Lora(use_peft=True, lora_r=2))
    model.peft_config["default"].base_model_name_or_path = str(saved)
    save_pretrained(model, tiny_tokenizer(), tmp_path_factory.mktemp("adapters") / "lora")
    return tmp_path_factory.getbasetemp() and next(iter(saved.parent.parent.glob("adapters*/lora")))


def copied(source, folder, weights=None, file="model.safetensors", **config):
    """The directory once more, its tensors changed by `weights`, keys of its configuration by `config`."""
    shutil.copytree(source, folder)
    if weights is not None:
        save_file(weights(load_file(source / file)), folder / file, metadata={"format": "pt"})
    name = "config.json" if file == "model.safetensors" else "adapter_config.json"
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, **config}))
    return folder


def opened(folder):
    source = find_model(str(folder))
    open_text(source, TextSettings())
    return load_model(source, load_model_config(source), device="cpu")


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def prefixed(tensors):
    return {f"x.{key}": value for key, value in tensors.items()}


def poisoned(number):
    def change(tensors):
        tensors[UP][0, 0] = number
        return tensors

    return change


WEIGHTS = {
    "other names": (prefixed, {}, "missing: lm_head.weight, model.embed_tokens.weight, .* and 18 more; no part of the "
                    "model: x.model.embed_tokens.weight, .* and 17 more"),
    "one is missing": (without(UP), {}, f"missing: {UP}; get the model again"),
    "more layers": (None, {"num_hidden_layers": 3}, "missing: model.layers.2.input_layernorm.weight, .* and 6 more"),
    "fewer layers": (None, {"num_hidden_layers": 1}, "no part of the model: model.layers.1.input_layernorm.weight"),
    "a head of its own": (None, {"tie_word_embeddings": False}, "missing: lm_head.weight"),
    "another width": (None, {"intermediate_size": 32}, r"of another shape: .*down_proj.weight \[32, 64\] for"),
    "NaN": (poisoned(float("nan")), {}, f"1 of 2048 numbers of {UP} are NaN or infinite"),
    "infinity": (poisoned(float("inf")), {}, f"1 of 2048 numbers of {UP} are NaN or infinite"),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_are_not_the_model_s(case, saved, tmp_path):
    weights, config, words = WEIGHTS[case]
    with pytest.raises(UserError, match=words) as error:
        opened(copied(saved, tmp_path / "bad", weights, **config))
    assert "\n" not in str(error.value) and str(tmp_path / "bad") in str(error.value)


def test_large_weights_and_a_head_written_out_are_fine(saved, tmp_path):
    def changed(tensors):
        tensors[UP] = torch.full_like(tensors[UP], 3e37)  # their sum is infinite, they are not
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    assert float(opened(copied(saved, tmp_path / "fine", changed)).state_dict()[UP].max()) > 1e37


ADAPTERS = {
    "half of it": (lambda t: {k: v for k, v in t.items() if ".0." in k}, {}, "missing: base_model.*layers.1"),
    "other names": (prefixed, {}, "missing: .*; no part of it: x.base_model.*; get the adapter again"),
    "another rank": (None, {"r": 3}, "cannot load the adapter"),
    "NaN": (lambda t: {k: v * torch.nan for k, v in t.items()}, {}, "are NaN or infinite"),
    "no base": (None, {"base_model_name_or_path": None}, "base_model_name_or_path is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_that_are_not_whole(case, adapter, tmp_path):
    weights, config, words = ADAPTERS[case]
    with pytest.raises(UserError, match=words) as error:
        opened(copied(adapter, tmp_path / "bad", weights, "adapter_model.safetensors", **config))
    assert "\n" not in str(error.value) and str(tmp_path / "bad") in str(error.value)


def test_an_adapter_on_itself_or_on_another(adapter, tmp_path):
    assert opened(adapter).config.model_type == "llama"
    bad = tmp_path / "bad"
    with pytest.raises(UserError, match="names this adapter itself; expected a whole model"):
        opened(copied(adapter, bad, None, "adapter_model.safetensors", base_model_name_or_path=str(bad)))
    with pytest.raises(UserError, match=r"names another adapter, .*; expected a whole model"):
        opened(copied(bad, tmp_path / "two", None, "adapter_model.safetensors", base_model_name_or_path=str(adapter)))


def test_a_tokenizer_larger_than_the_embeddings(tmp_path):
    folder = save_tiny(tmp_path / "small", vocab_size=262)
    with pytest.raises(
        UserError, match=r"small: the tokenizer has ids up to 264 \('<\|im_start\|>'\), .*262 tokens"
    ) as error:
        opened(folder)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="ids up to 264"):
        open_model((tiny_model(vocab_size=262), tiny_tokenizer()), TextSettings())
    assert opened(save_tiny(tmp_path / "fits", vocab_size=265))


def test_an_encoder_is_no_language_model(tmp_path):
    sizes = {"vocab_size": 272, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="expected a causal language model, got bert"):
        opened(tmp_path / "bert")
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5", "vocab_size": 272}')
    tiny_tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="t5: Unrecognized configuration class") as error:
        opened(tmp_path / "t5")
    assert "\n" not in str(error.value)


def test_a_model_that_fails_is_one_line():
    model = tiny_model()
    model.lm_head = torch.nn.Linear(31, 272)
    with pytest.raises(UserError, match=r"model: here cannot be run \(sdpa attention\): mat1 and mat2") as error:
        check_causal(model, "here")
    assert "\n" not in str(error.value)


def test_a_run_s_directory_is_not_its_model(saved, adapter, tmp_path):
    for name, source in (("whole", saved), ("adapter", adapter)):
        shutil.copytree(source, tmp_path / name / "model")
        with pytest.raises(UserError, match=rf"is the directory of a run; did you mean .*{name}/model\?"):
            find_model(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("~nobody-at-all/model", "there is no such user, so no home directory"),
        ("x" * 5000, "cannot look at 'x+...': File name too long"),
        ("a\0b", "is no name of a file"),
        ("./none", "no such file or directory"),
    ],
)
def test_names_that_no_model_can_have(name, words):
    with pytest.raises(UserError, match=f"^model: .*{words}") as error:
        find_model(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_flex_attention_needs_a_gpu():
    with pytest.raises(UserError, match="attn_implementation: flex_attention needs a CUDA device: set it to auto"):
        find_attention("flex_attention", "float32", "cpu")


@pytest.mark.parametrize("device", ["meta", "gpu", "cuda:7", "", "cpu cpu"])
def test_devices_that_are_none(device):
    with pytest.raises(UserError, match=r"^device: ") as error:
        find_device(device)
    assert "\n" not in str(error.value)
