"""bench.ablations: every row runs from its start, is run once, and is compared problem by problem."""

import io
import json

import pytest
from rich.console import Console

from bench import ablations
from gem.errors import UserError
from tests.helpers import save_tiny

SMALL = {"max_completion_length": 6, "max_steps": 1, "prompts_per_step": 2, "num_generations": 2}
SETTINGS = {**ablations.SETTINGS, **SMALL}
SIZES = {"train_pairs": 4, "held_out_pairs": 5, "problems": 2}


def run(folder, keys, num_seeds=1, settings=SETTINGS):
    model = folder / "model"
    if not model.is_dir():
        save_tiny(model, context=1024)
    console = Console(file=io.StringIO())
    return ablations.run(folder / "out", str(model), num_seeds, keys, settings, SIZES, console)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ablations")


def test_all_rows_and_then_none_again(folder, monkeypatch):
    keys = [row.key for row in ablations.ROWS]
    results = run(folder, keys)
    assert list(results) == keys
    for runs in results.values():
        assert len(runs) == 1 and len(runs[0]["won"]) == 5 and len(runs[0]["solved"]) == 2
    assert not list((folder / "out").rglob("*.safetensors"))
    monkeypatch.setattr(ablations, "train", None)  # running anything now fails
    assert run(folder, keys) == results
    with pytest.raises(UserError, match="other settings"):
        run(folder, keys, settings={**SETTINGS, "max_steps": 2})


def test_a_row_that_is_missing_gets_its_start_again(folder):
    """The row alone is removed, with the SFT model long deleted; its numbers come back to the bit."""
    path = folder / "out" / "seed-0" / "no_fork.json"
    before = json.loads(path.read_text())
    path.unlink()
    after = run(folder, ["no_fork"])["no_fork"][0]
    assert {**after, "seconds": 0} == {**before, "seconds": 0}
    config = (folder / "out" / "seed-0" / "no_fork" / "config.yaml").read_text()
    assert "fork_weight: 0.0" in config and "seed-0/sft/model" in config


def test_the_table_compares_problem_by_problem(tmp_path):
    results = {
        "sft": [{"won": [1, 0, 1, 0], "solved": [0, 0]}, {"won": [1, 0, 0, 0], "solved": [0, 1]}],
        "gem": [{"won": [1, 1, 1, 0.5], "solved": [1, 1]}, {"won": [1, 0, 1, 0.5], "solved": [1, 1]}],
    }
    lines = ablations.markdown(results).splitlines()
    assert lines[0].startswith("| 2 seeds | preference accuracy (4 pairs)")
    sft, gem = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    assert sft[1].startswith("0.375 [") and sft[2] == "0.500, 0.250" and sft[3] == "-"
    # Changes 0, 0.5, 0.5, 0.5: never negative, so neither is the interval.
    assert gem[1].startswith("0.750 [") and gem[3].startswith("+0.375 [+") and gem[5].startswith("+0.750 [")
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- ablations -->\nold\n<!-- /ablations -->\nb\n")
    ablations.put_table(page, "new\n")
    assert page.read_text() == "a\n<!-- ablations -->\nnew\n<!-- /ablations -->\nb\n"
    page.write_text("a")
    with pytest.raises(UserError, match="ablations"):
        ablations.put_table(page, "new")
