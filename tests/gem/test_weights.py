"""gem merge, gem push and gem chat."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from transformers import AutoModelForCausalLM

from gem.config.settings import Lora, TextSettings
from gem.config.use import GenerateSettings
from gem.errors import UserError
from gem.model.load import save_pretrained
from gem.model.lora import add_lora
from gem.model.opened import open_model
from gem.terminal.console import make_console
from gem.use import chat as chatting
from gem.use.chat import fitting
from gem.use.generate import generate
from tests.faults.calls import call
from tests.helpers import save_tiny, tiny_model, tiny_tokenizer

IDS = torch.tensor([[1, 2, 3, 40, 50]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model and an adapter on it that changes it."""
    folder = tmp_path_factory.mktemp("weights")
    save_tiny(folder / "base")
    torch.manual_seed(0)
    model = add_lora(tiny_model(), Lora(use_peft=True, lora_r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    save_pretrained(model, tiny_tokenizer(), folder / "adapter")
    torch.save(model(IDS).logits.detach(), folder / "logits.pt")
    return folder


def test_an_adapter_is_merged_into_its_model(folder, tmp_path):
    code, out, errors = call("merge", folder / "adapter", "--out", tmp_path / "whole")
    assert (code, out) == (0, "") and f"Model: {tmp_path / 'whole'}" in errors
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")(IDS).logits.detach()
    truth = torch.load(folder / "logits.pt")
    assert float((logits - truth).abs().max()) < 1e-5 * float(truth.abs().max())
    plain = tiny_model()(IDS).logits.detach()
    assert float((logits - plain).abs().max()) > 1e-2 * float(truth.abs().max())
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
    for arguments, words in (
        (["merge", folder / "base", "--out", tmp_path / "x"], "is no LoRA adapter but a whole model"),
        (["merge", folder / "adapter", "--out", tmp_path / "whole"], "--out: .*whole exists"),
        (["merge", folder / "adapter", "--out", tmp_path / "x", "--dtype", "int8"], "--dtype: expected float32"),
    ):
        code, _, errors = call(*arguments)
        assert code == 2 and words.split(".*")[-1] in errors and errors.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


class Hub:
    """In place of the hub's client: what it was asked for."""

    calls: ClassVar[list] = []
    error: Exception | None = None

    def create_repo(self, repo, **arguments):
        if self.error is not None:
            raise self.error
        self.calls.append((repo, arguments))

    def upload_folder(self, **arguments):
        self.calls.append(arguments)


def test_a_model_is_pushed(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    Hub.calls = []
    code, _, errors = call("push", folder / "adapter", "me/model", "--private")
    assert code == 0 and "Model: https://huggingface.co/me/model" in errors
    (repo, made), sent = Hub.calls
    assert repo == "me/model" and made["private"] and sent["folder_path"] == folder / "adapter"
    patterns = sent["allow_patterns"]
    assert "*.safetensors" in patterns and not any(pattern in ("*", "*.pt", "*.jsonl", "*.py") for pattern in patterns)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["none"], None, "REPO: expected OWNER/NAME, got 'none'"),
        (["me/../x"], None, "REPO: expected OWNER/NAME"),
        (["me/model"], LocalTokenNotFoundError("no"), "no key of the hub here: run hf auth login, or set HF_TOKEN"),
        (["me/model"], OSError("network\nis down"), "push: no answer from the hub: network is down"),
        (
            ["me/model"],
            HfHubHTTPError.__bases__[0]("[Errno -2] no name"),
            "push: no answer from the hub: [Errno -2] no name; look",
        ),
    ],
)
def test_a_push_that_fails_is_one_line(folder, monkeypatch, arguments, error, words):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "error", error)
    code, _, errors = call("push", folder / "base", *arguments)
    assert code == 2 and words in errors.splitlines()[-1] and "Traceback" not in errors


def test_a_chat_remembers_and_forgets(folder, monkeypatch):
    seen = []

    def recorded(policy, form, prompts, *rest, **more):
        seen.append(form.tokenizer.decode(prompts[0]))
        return original(policy, form, prompts, *rest, **more)

    original = chatting.roll_out
    monkeypatch.setattr(chatting, "roll_out", recorded)
    command = ["chat", folder / "base", "--max-completion-length", 6, "--device", "cpu"]
    code, out, _ = call(*command, stdin="one?\n\ntwo?\n/new\nthree?\n/quit\nfour?\n")
    assert code == 0 and len(seen) == 3
    assert "one?" in seen[1] and "two?" in seen[1] and "one?" not in seen[2] and "three?" in seen[2]
    settings = GenerateSettings(max_completion_length=6, system_prompt="", device="cpu")
    (row,) = generate(str(folder / "base"), "one?", settings, None, make_console(quiet=True))
    first = row["completion"].splitlines()[0] if row["completion"].splitlines() else ""
    assert out.startswith(first[:3]) and "\x1b" not in out
    assert call(*command, stdin="")[:2] == (0, "")


def test_a_long_chat_loses_its_oldest_turns(folder):
    opened = open_model(str(folder / "base"), TextSettings(system_prompt=""))
    turns = [(role, f"{i}" * 100) for i in range(3) for role in ("user", "assistant")] + [("user", "end?")]
    assert fitting(turns, opened, 20) == turns[2:]  # a question goes with its answer
    assert fitting(turns[4:], opened, 20) == turns[4:]
    with pytest.raises(UserError, match="does not fit the model's context of 512 tokens"):
        fitting([("user", "x" * 600)], opened, 20)


def test_completion_is_there_for_the_shell(monkeypatch):
    monkeypatch.setenv("_GEM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "gem ev")
    monkeypatch.setenv("COMP_CWORD", "1")
    code, out, _ = call()
    assert (code, out.split()) == (0, ["evaluate"])
