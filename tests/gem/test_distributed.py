"""Two gloo processes on a CPU give what one gives: metrics, samples and weights; whole, under LoRA, and sharded."""

import io

import pytest
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM

from gem.config.read import build_config
from gem.demo.arithmetic import arithmetic_pairs
from gem.files import write_jsonl
from gem.loop import train
from tests.helpers import LORA, assert_close, assert_same_weights, launch, rows, save_tiny, settings
from tests.processes import ROOT, torchrun

CASES = {
    "full": ({}, {}),
    "lora": (LORA, {}),
    "fsdp2": ({}, {"ACCELERATE_USE_FSDP": "true"}),
    "fsdp2 lora": (LORA, {"ACCELERATE_USE_FSDP": "true"}),
    "dpo": ({"objective": "dpo", "beta": 0.0}, {}),
    "fsdp2 filtered dpo": ({"objective": "filtered_dpo"}, {"ACCELERATE_USE_FSDP": "true"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gem")
    save_tiny(folder / "model")
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(16))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(folder, case):
    more, environment = CASES[case]
    name = case.replace(" ", "-")
    alone = train(build_config(settings(folder, f"{name}-1", **more)), Console(file=io.StringIO()))
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings(folder, f"{name}-2", **more)))
    if case == "fsdp2 lora":  # the launcher itself, once
        output = torchrun(2, ROOT / "gem" / "__main__.py", "train", path, environment=environment)
    else:
        output = launch(path, **environment)
    together = folder / f"{name}-2"
    assert output.count("Loading") == 1  # one process speaks
    assert sorted(p.name for p in together.iterdir()) == sorted(p.name for p in alone.run_dir.iterdir())
    assert_close(rows(alone.run_dir), rows(together))
    if case != "dpo":
        assert_close(rows(alone.run_dir, "completions.jsonl"), rows(together, "completions.jsonl"))
    one, two = (AutoModelForCausalLM.from_pretrained(d / "model").state_dict() for d in (alone.run_dir, together))
    assert_same_weights(one, two)


def test_shards_are_saved_whole_and_resumed_exactly(folder):
    """A sharded run whose last checkpoint is taken away repeats its end, to the bit."""
    import shutil

    path = folder / "again.yaml"
    path.write_text(yaml.safe_dump(settings(folder, "again")))
    launch(path, ACCELERATE_USE_FSDP="true")
    run_dir = folder / "again"
    before, weights = rows(run_dir), (run_dir / "model" / "model.safetensors").read_bytes()
    names = sorted((p.name for p in run_dir.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1]))
    shutil.rmtree(run_dir / names[-1])
    shutil.rmtree(run_dir / "model")
    output = launch(path, "--resume", ACCELERATE_USE_FSDP="true")
    assert f"Continuing from {names[-2]}" in output
    assert rows(run_dir) == before
    assert (run_dir / "model" / "model.safetensors").read_bytes() == weights
