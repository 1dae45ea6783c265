"""A finished run that is given more steps ends where a run of so many steps ends, to the bit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from gem.checkpoint import states
from gem.config.read import build_config
from gem.demo.arithmetic import arithmetic_pairs
from gem.errors import UserError
from gem.files import write_jsonl
from gem.loop import train
from gem.terminal.console import make_console
from tests.helpers import rows, save_tiny, settings

QUIET = make_console(quiet=True)
FEW = {"eval_generate": 0, "eval_sample": 0, "log_completions_steps": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extend")
    save_tiny(folder / "model")
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(12))
    return folder


def run(folder, name, steps, resume=False, **more):
    return train(build_config(settings(folder, name, **{**FEW, "max_steps": steps, **more})), QUIET, resume=resume)


def test_more_steps_are_those_of_a_longer_run(folder):
    long = run(folder, "long", 5)
    short = run(folder, "short", 3)
    before = load_file(short.model_dir / "model.safetensors")
    run(folder, "short", 5, resume=True)
    found, whole = (load_file(made.model_dir / "model.safetensors") for made in (short, long))
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    assert not all(torch.equal(before[name], value) for name, value in whole.items())
    kept = load_file(short.run_dir / "model-3" / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in before.items())
    assert rows(short.run_dir) == rows(long.run_dir)


def test_a_run_that_cannot_be_extended_says_so(folder):
    run(folder, "done", 2)
    with pytest.raises(UserError, match=r"is complete; its model is .*more than max_steps: 2 continue it"):
        run(folder, "done", 2, resume=True)
    own = rf"continue with the run's own settings: gem train {folder}/done/config.yaml --resume;"
    with pytest.raises(UserError, match=f"seed changed since the run began .*{own}"):
        run(folder, "done", 3, resume=True, seed=1)
    run(folder, "falls", 2, lr_schedule="cosine")
    with pytest.raises(UserError, match="a run with lr_schedule: cosine cannot be given more max_steps"):
        run(folder, "falls", 3, resume=True, lr_schedule="cosine")
    assert (folder / "falls" / "model").is_dir()


def test_a_run_without_a_checkpoint_keeps_its_model(folder):
    """Whatever is asked of it, what is said of a finished run leads on from its model, and never to its removal."""
    done = run(folder, "bare", 1, save_steps=0)
    for steps in (1, 2):
        with pytest.raises(UserError) as error:
            run(folder, "bare", steps, resume=True, save_steps=0)
        words = str(error.value)
        assert "is complete" in words and "no checkpoint to go on from (save_steps leaves one)" in words
        assert words.endswith(f"start a new run with another output_dir and model: {done.model_dir}")
        assert "\n" not in words and "remove" not in words
    kept = run(folder, "broken", 1)
    for path in states.checkpoints(kept.run_dir):
        (path / "checksums.json").write_text("")
    with pytest.raises(UserError, match=rf"is whole: .*another output_dir and model: {kept.model_dir}$"):
        run(folder, "broken", 2, resume=True)
