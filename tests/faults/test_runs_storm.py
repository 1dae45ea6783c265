"""The storm itself: it sees what differs, and one small case of it passes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.faults import storm


def run_of(folder, loss=1.0, weight=1.0, samples="{}\n", time=0.5):
    (folder / "model").mkdir(parents=True)
    row = {"stage": "SFT", "step": 1, "loss": loss, "step_time": time}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "completions.jsonl").write_text(samples)
    save_file({"w": torch.full((3,), weight, dtype=torch.float32)}, folder / "model" / "model.safetensors")
    return folder


def test_what_differs_is_seen(tmp_path):
    one = run_of(tmp_path / "one")
    assert storm.differences(one, run_of(tmp_path / "same", time=9.0)) == []
    changes = {
        "metrics.jsonl": {"loss": 1.0000000000000002}, "weights": {"weight": 1.0000001},
        "completions.jsonl": {"samples": '{"a": 1}\n'},
    }  # fmt: skip
    for name, change in changes.items():
        assert storm.differences(one, run_of(tmp_path / name.replace(".", "-"), **change)) == [name]
    (one / ".checkpoint-1.part").mkdir()
    assert storm.differences(run_of(tmp_path / "other"), one) == [".checkpoint-1.part"]


class Done:
    """A process that has ended."""

    def __init__(self, returncode, output):
        self.returncode, self.output = returncode, output

    def wait(self, timeout):
        return self


@pytest.mark.parametrize(
    ("code", "output"),
    [
        (2, "Traceback (most recent call last)\ngem: x\n"), (2, "no line\n"), (2, "gem: one\ngem: two\n"),
        (1, "gem: a bug\n"), (0, "gem: a line\n"), (-15, "Loading\n"), (130, ""),
    ],
)  # fmt: skip
def test_an_end_without_its_one_line_is_wrong(tmp_path, code, output):
    with pytest.raises(storm.Wrong):
        storm.Storm(tmp_path, 0).end(Done(code, output), (15,))


def test_an_end_with_its_one_line_is_right(tmp_path):
    one = storm.Storm(tmp_path, 0)
    first = "gem: SIGTERM: the run ends after this step, with a checkpoint; once more: at once\n"
    for code, output in (
        (0, "Run: x\n"),
        (2, "gem: cannot\n"),
        (143, first + "gem: ended by SIGTERM; checkpoint-1 is\n"),
    ):
        assert one.end(Done(code, output)) == code
    assert one.end(Done(-15, ""), (15,)) == -15 and one.end(Done(-9, "Loading\n"), (9,)) == -9
