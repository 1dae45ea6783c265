"""gem train --dry-run: every check but the weights', sizes that agree with the model, nothing written."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from gem.config.read import build_config
from gem.demo.arithmetic import arithmetic_pairs
from gem.files import write_jsonl
from gem.model.lora import add_lora
from gem.plan.dry_run import dry_run, kv_bytes, plan
from gem.run.session import read_inputs
from gem.terminal.console import make_console
from tests.faults.calls import call
from tests.helpers import RUN, save_tiny, tiny_model

QUIET = make_console(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    save_tiny(folder / "model")
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(10))
    return folder


def values(folder, **more):
    paths = {"model": folder / "model", "train_file": folder / "pairs.jsonl", "output_dir": folder / "out"}
    return {**RUN, **{key: str(path) for key, path in paths.items()}, **more}


def test_it_says_what_a_run_takes_and_writes_nothing(folder):
    (folder / "c.yaml").write_text(yaml.safe_dump(values(folder)))
    before = sorted(path.name for path in folder.iterdir())
    code, out, errors = call("train", folder / "c.yaml", "--dry-run")
    assert code == 0, errors
    number = sum(p.numel() for p in tiny_model().parameters())
    assert f"Model: {number:,} parameters; float32 on cpu" in out
    assert "Rows: 8 pairs to train on, 2 held out, 8 prompts to sample for" in out
    assert "Memory: at least " in out and "Time: at least " in out and "nothing was written" in out
    assert sorted(path.name for path in folder.iterdir()) == before


def test_the_counts_are_those_of_the_run(folder):
    config = build_config(values(folder, use_peft=True, lora_r=4, sft_epochs=2))
    inputs = read_inputs(config, QUIET)
    made = plan(config, inputs, (1e9, 1e8))
    model = add_lora(AutoModelForCausalLM.from_pretrained(folder / "model"), config)
    assert made.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert made.sft_tokens == 2 * sum(len(p.prompt_ids) + len(p.sft_ids) for p in inputs.train_pairs)
    assert made.seconds_by_part["SFT"] == pytest.approx(6 * made.parameters * made.sft_tokens / 1e9)
    assert made.bytes_by_part["weights"] == 4 * made.parameters and made.bytes_by_part["AdamW"] == 8 * made.trained
    # 3 steps of 3 prompts with 2 candidates of at most 6 tokens; 3 evaluations of 2 problems and 2 prompts with 2.
    assert made.sampled_tokens == (3 * 3 * 2 + 3 * (2 + 2 * 2)) * 6
    with torch.no_grad():
        cache = tiny_model()(torch.ones(1, 5, dtype=torch.int64), use_cache=True).past_key_values
    found = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * 4
    assert kv_bytes(inputs, 4) * 5 == found


def test_what_is_wrong_is_told(folder, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    for more, words in (
        ({"train_file": str(tmp_path / "bad.jsonl")}, 'bad.jsonl:1: the key "chosen" is missing'),
        ({"device": "cuda:7"}, "device: cannot use 'cuda:7'"),
        ({"max_completion_length": 600}, "context of 512"),
        ({"output_dir": str(folder)}, "is not empty"),
        ({"use_peft": True, "lora_target_modules": "nothing"}, "lora_target_modules: the model has no 'nothing'"),
    ):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(values(folder, **more)))
        code, out, errors = call("train", tmp_path / "c.yaml", "--dry-run")
        assert code == 2 and words in errors and "Dry run" not in out, errors
    code, _, errors = call("train", tmp_path / "c.yaml", "--dry-run", "--resume", "--output_dir", "x")
    assert code == 2 and "--dry-run: expected a new run" in errors


def test_other_objectives_have_their_own_counts(folder):
    updates = {}
    for objective in ("sega", "dpo", "filtered_dpo", "rejection_sampling"):
        config = build_config(values(folder, objective=objective))
        updates[objective] = dry_run(config, QUIET)
    assert updates["dpo"].sampled_tokens < updates["rejection_sampling"].sampled_tokens
    assert len({made.update_tokens for made in updates.values()}) == 3
    assert all(made.update_tokens > 0 for made in updates.values())
