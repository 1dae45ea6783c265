"""bench.evidence: every row runs from its start, is run once, and is compared problem by problem."""

import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from bench.evidence import __main__ as evidence
from bench.evidence import curves, gate, objectives, presets, tables
from bench.evidence.data import HELD_OUT_SEED, task_rows
from bench.evidence.start import GIVEN_STEP, POOL_STEP, load_or_sample_pool, make_config, open_start
from gem.config.settings import TrainConfig
from gem.data.answers import extract_answer
from gem.errors import UserError
from gem.files import write_jsonl
from gem.loop import TrainResult
from gem.scoring.score import paper_score
from tests.helpers import save_tiny

# Short answers: after a few dozen steps the tiny model gives one, and ends.
SETTINGS = {
    "system_prompt": "Think.",
    "sft_epochs": 25,
    "sft_learning_rate": 3e-3,
    "learning_rate": 1e-2,
    "device": "cpu",
}
SIZES = {**evidence.QUICK, "given_pairs": 8, "pool_prompts": 6, "num_generations": 4, "problems": 5}
SIZES |= {"max_completion_length": 20}


def pairs(number):
    return [
        {"prompt": f"{i % 7} or {i}?", "chosen": f"Final Answer: {i % 2}", "rejected": "Final Answer: 23"}
        for i in range(number)
    ]


def plan_of(folder, rows=evidence.ALL_ROWS, **settings):
    model = folder / "model"
    if not model.is_dir():
        save_tiny(model, context=1024)
        write_jsonl(folder / "pairs.jsonl", pairs(24))
    console = Console(file=io.StringIO())
    settings = {**SETTINGS, **settings}
    return evidence.Plan(folder / "out", str(folder / "pairs.jsonl"), str(model), rows, SIZES, settings, console)


def results(folder):
    return {path.stem: json.loads(path.read_text()) for path in (folder / "out" / "seed-0").glob("*.json")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    evidence.run(plan_of(folder), 1)
    return folder


def test_all_rows_and_then_none_again(folder, monkeypatch):
    found = results(folder)
    assert sorted(found) == sorted(set(evidence.ALL_ROWS) - {"base_scores", "came"})
    for key, row in found.items():
        assert len(row["right"]) == 5, key
        if key not in ("scores", "sft", *evidence.PRESET_KEYS):
            assert len(row["right"][0]) == SIZES["samples"] and len(row["won"]) == SIZES["preference_pairs"]
            assert row["curve"][0]["held_out_logprob"] < 0 and "loss" in row["curve"][-1], key
    assert found["rejection"]["winners"] == found["random"]["winners"] > 0
    assert not list((folder / "out").rglob("*.safetensors"))
    names = tables.all_tables(folder / "out", 1)
    assert list(names) == list(tables.TABLES)
    for key in ("calibrated", "paper", "length"):
        assert key in names["pairs"] and key in names["scores"]
    others = {"base_scores", "scores", "came", *evidence.PRESET_KEYS}
    assert len(names["objectives"].splitlines()) == 2 + len(set(evidence.ALL_ROWS) - others)
    assert curves.draw_curves(folder / "out", 1, folder / "curves.svg")
    drawn = (folder / "curves.svg").read_text()
    assert all(f"{objective.words} (1 seed)" in drawn for objective in objectives.OBJECTIVES)
    assert not curves.draw_curves(folder / "nothing", 1, folder / "none.svg") and not (folder / "none.svg").exists()
    monkeypatch.setattr(evidence, "open_start", None)  # running anything now fails
    evidence.run(plan_of(folder), 1)
    assert results(folder) == found
    with pytest.raises(UserError, match="other settings"):
        evidence.run(plan_of(folder, learning_rate=1e-3), 1)


def test_a_row_that_is_missing_gets_its_start_again(folder):
    """The row alone is removed, with the SFT model long deleted; its numbers come back to the bit."""
    path = folder / "out" / "seed-0" / "rejection_mean.json"
    before = json.loads(path.read_text())
    path.unlink()
    evidence.run(plan_of(folder, rows=("rejection_mean",)), 1)
    assert {**json.loads(path.read_text()), "seconds": 0} == {**before, "seconds": 0}


def start_of(folder, **changes):
    plan = plan_of(folder)
    files = {name: folder / "out" / "seed-0" / f"{name}.jsonl" for name in ("given", "pool", "held_out", "few")}
    settings = {**evidence.common_settings(plan), **changes}
    start = open_start(plan.model, files, make_config(folder, "x", plan.model, files, 0, **settings))
    own, pool = (
        load_or_sample_pool(folder / "out" / "seed-0" / f"{name}.pt", start, pairs, step)
        for name, pairs, step in (("given", start.data.given, GIVEN_STEP), ("pool", start.data.pool, POOL_STEP))
    )
    return dataclasses.replace(start, own=own), pool


def test_the_pool_scores_some_prompts_as_it_scores_all(folder):
    start, pool = start_of(folder)
    linear = paper_score(start.config)
    every = pool.scored(start.form, start.config, linear)
    some = pool.scored(start.form, start.config, linear, [1, 4])
    groups = every.scores.score.view(-1, pool.num_generations)[[1, 4]]
    assert torch.equal(some.scores.score.view(2, -1), groups)
    assert torch.equal(some.advantages.view(2, -1), every.advantages.view(-1, pool.num_generations)[[1, 4]])


def test_no_term_of_the_score_is_there_where_its_weight_is_zero(folder):
    """The rows without a term differ from the paper's in the settings that the score is made of."""
    changes = {row.key: row.changes for row in objectives.OBJECTIVES}
    for key, feature in (("sega_no_final", "final_entropy"), ("sega_no_fork", "fork_entropy")):
        start, _ = start_of(folder, **changes[key])
        assert paper_score(start.config).coefficient(feature) == 0
        assert sum(value != 0 for value in paper_score(start.config).coefficients) == 1
    start, _ = start_of(folder, **changes["sega_no_chain"])
    assert not start.form.chain_of_thought


def test_random_winners_are_as_many_and_could_have_won(folder, monkeypatch):
    start, pool = start_of(folder)
    seen = {}

    def keep(start, pool, scored, winners):
        seen["scored"], seen["winners"] = scored, winners
        return {}

    monkeypatch.setattr(objectives, "learn_winners", keep)
    objectives.rejection(start, pool)
    real = seen["winners"]
    objectives.random_winners(start, pool)
    assert len(seen["winners"]) == len(real) > 0
    rows = [winner.row for winner in seen["winners"]]
    assert len({row // pool.num_generations for row in rows}) == len(rows)
    for winner in seen["winners"]:
        assert objectives.could_win(seen["scored"], winner.row)
        assert winner.pair.chosen_ids == tuple(pool.completions[winner.row])
        assert winner.pair.prompt_ids == pool.pairs[winner.row // pool.num_generations].prompt_ids


def test_parts_of_a_task_share_no_prompt(tmp_path):
    sizes = {**evidence.SIZES, "given_pairs": 5, "pool_prompts": 4, "problems": 4}
    path = tmp_path / "task.jsonl"
    write_jsonl(path, pairs(16))
    held_out = []
    for task in ("arithmetic", str(path)):
        for seed in (0, HELD_OUT_SEED):  # of arithmetic this seed gives the held-out problems themselves
            parts = task_rows(task, seed, sizes)
            prompts = [row["prompt"] for rows in parts.values() for row in rows]
            assert len(prompts) == len(set(prompts)) and all(parts.values())
            held_out.append(parts["held_out"])
            assert all(row["answer"] == extract_answer(row["chosen"], "Final Answer:") for row in parts["held_out"])
    assert held_out[0] == held_out[1] and held_out[2] == held_out[3] and len(held_out[2]) == 4
    with pytest.raises(UserError, match="too few"):
        task_rows(str(path), 0, {**sizes, "given_pairs": 30})


def test_the_table_compares_problem_by_problem(tmp_path):
    # SFT has two more samples, with no draw of the other row beside them: they do not count.
    rights = {
        "sft": ([[1, 0, 1, 1], [0, 0, 1, 1]], [[0, 0, 1, 1], [0, 0, 1, 1]]),
        "x": ([[1, 1], [1, 0]], [[1, 1], [1, 1]]),
    }
    wins = {"sft": ([1, 0], [1, 0]), "x": ([1, 1], [1, 0.5])}
    found = {
        key: [
            {"seed": i, "right": right, "won": won, "truncated": i / 4}
            for i, (right, won) in enumerate(zip(rights[key], wins[key]))
        ]
        for key in rights
    }
    lines = tables.objective_table(found, {"sft": "SFT alone", "x": "other"}).splitlines()
    assert lines[0].startswith("| 2 seeds | sampled accuracy (2 problems x 2)")
    sft, other = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    assert sft[1].startswith("0.125 [") and sft[2] == "-" and sft[3] == "0.250, 0.000" and sft[4] == "0.12"
    # Changes 0.75 and 0.75: the interval has no width; pairs: 0 and 0.75. Of the seeds 0.5 and 1.
    assert other[2] == "+0.750 [+0.750, +0.750]" and other[6] == "+0.375 [+0.000, +0.750]"
    assert other[3] == "+0.500, +1.000"
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- t x -->\nold\n<!-- /t x -->\nb\n")
    tables.put_table(page, "t x", "new\n")
    assert page.read_text() == "a\n<!-- t x -->\nnew\n<!-- /t x -->\nb\n"
    page.write_text("a")
    with pytest.raises(UserError, match="t x"):
        tables.put_table(page, "t x", "new")


def test_the_preset_table_is_of_each_run_and_its_own_sft():
    """Seeds end in other ways; the change is problem by problem, from the SFT of the same run."""

    def row(sft, right, ending):
        return {"sft": {"right": sft}, "right": right, "end": {"ending": ending, "said": []}}

    rows = [row([[1, 0], [0, 0]], [[1, 1], [1, 0]], "trained"), row([[1, 1], [0, 0]], [[1, 1], [0, 0]], "gate")]
    lines = tables.preset_table({"x": rows}, [{"right": [[1, 0], [0, 0]]}]).splitlines()
    assert lines[0].startswith("| 2 seeds | after SFT (2 problems)")
    came, cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    assert came[0] == "the model as it came" and came[2].startswith("0.250 [")
    assert cells[1].startswith("0.375 [") and cells[2].startswith("0.625 [") and cells[3].startswith("+0.250 [")
    assert cells[4] == "0.250 → 0.750, 0.500 → 0.500"
    assert cells[5] == "trained; the gate kept SFT's model"


def test_how_a_run_ended_is_read_from_the_run(tmp_path):
    def end(stages, saved, *rows):
        write_jsonl(tmp_path / "metrics.jsonl", [{"stage": "eval"}, *rows])
        return presets.end_of(TrainResult(tmp_path, tmp_path, dict.fromkeys(stages), {}, None, saved))

    objective = ["start", "SFT", "rejection sampling"]
    assert end(objective, objective[-1])["ending"] == "trained"
    shut = {"stage": "score", "words": "Not informative.", "done": "rejection sampling is not run"}
    assert end(objective[:2], "SFT", shut) == {
        "ending": "gate",
        "said": ["Not informative. rejection sampling is not run"],
    }
    assert end(objective, "SFT", {"action": "keep_best", "done": "fell"})["ending"] == "keep_best"
    stopped = {"guards": ["kl"], "action": "stop", "done": "the run ends"}
    assert end(objective, objective[-1], stopped) == {"ending": "guard", "said": ["['kl'] the run ends"]}


def test_weights_are_the_same_or_not(tmp_path):
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        (tmp_path / name).mkdir()
        save_file({"x": torch.tensor([value])}, tmp_path / name / "model.safetensors")
    assert presets.same_weights(tmp_path / "a", tmp_path / "b")
    assert not presets.same_weights(tmp_path / "a", tmp_path / "c")


def test_the_gate_is_tried_on_own_answers_that_know_something_and_on_some_that_do_not(capsys):
    right = np.array([[True, False, False], [True, True, True]])
    valid = np.array([[True, True, False], [True, True, True]])
    features = np.arange(54.0).reshape(2, 3, 9)
    own = gate.own_pairs(features, right, valid, ["p", "q"])
    assert own.prompts == ["p"] and np.array_equal(own.chosen, features[0, :1])
    assert np.array_equal(own.rejected, features[0, 1:2])
    seed = gate.load(0, "arithmetic")
    assert seed.features.shape == (128, 8, 9) and len(seed.given.prompts) == 48 and len(seed.held_out.prompts) == 32
    # Features, in the order of FEATURES, from scores under their names, with their signs.
    told = json.loads((gate.RESULTS / "arithmetic" / "seed-0" / "scores.json").read_text())["samples"]
    assert np.array_equal(seed.features[..., 0], -np.array(told["-final_entropy"]))
    assert np.array_equal(seed.features[..., 5], np.array(told["mean_logprob"]))
    known, unknown = (gate.shares("arithmetic", known, 9, 8).mean(0) for known in (True, False))
    assert known[1] > unknown[1] and known[2] > unknown[2]
    gate.main(["--draws", "3"])
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_the_score_table_by_hand():
    """Two problems of three samples: a tie is one half, and an invalid sample is never the best."""
    right = torch.tensor([[True, False, False], [False, True, True]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    scores = torch.tensor([[1.0, 1.0, 9.0], [0.0, 2.0, -1.0]])
    assert tables.best_of(scores, right, valid).tolist() == [0.5, 1.0]
    # Pairs: (1, 1) tie; (2, 0) won; (-1, 0) lost.
    cell = tables.auroc_cell(scores[None], right[None], valid[None])
    assert cell.startswith("0.500 [")
    result = {"seed": 0, "given": {"paper": [1.0, -1.0, 0.0]}, "given_prompts": ["a", "b", "c"]}
    assert tables.pair_cell([result], "given", "paper").startswith("0.500 [")
    assert tables.pair_cell([result], "given", "calibrated") == "-"
    # The same pairs in two seeds are no new ones: as many as one seed's, with the width of these.
    assert tables.pair_cell([result, {**result, "seed": 1}], "given", "paper").startswith("0.500 [0.0")
    assert np.isclose(float(tables.of_problems({"right": [[1, 0], [1, 1]]}).mean()), 0.75)


def test_the_command_line(tmp_path, capsys):
    plan_of(tmp_path)  # the model and the pairs
    page = tmp_path / "page.md"
    page.write_text("<!-- pairs pairs -->\n<!-- /pairs pairs -->\n")
    arguments = [
        "--out", str(tmp_path / "o"), "--task", str(tmp_path / "pairs.jsonl"), "--model", str(tmp_path / "model"),
        "--seeds", "1", "--quick", "--max-completion-length", "20", "--score-samples", "0", "--num-generations", "8",
        "--pool-prompts", "8", "--docs", str(page),
    ]  # fmt: skip
    evidence.main([*arguments, "--rows", "base_scores,scores"])
    assert "| calibrated on the given pairs alone |" in page.read_text()
    shown = capsys.readouterr().out
    assert "before SFT, 4 pairs | after SFT, its own 6 pairs x 1 seeds | after SFT, 2 held-out pairs" in shown
    assert [path.stem for path in (tmp_path / "o").glob("*.md")] == ["pairs"]  # nothing was sampled
    assert not list(tmp_path.rglob("*.svg"))
    page.write_text("<!-- pairs objectives -->\n<!-- /pairs objectives -->\n")
    evidence.main([*arguments, "--rows", "dpo"])
    assert "| plain DPO on the given pairs |" in page.read_text()
    assert "plain DPO on the given pairs (1 seed)" in (tmp_path / "page-curves.svg").read_text()
    page.write_text("<!-- other pairs -->\n<!-- /other pairs -->\n")
    with pytest.raises(UserError, match="pairs NAME"):
        evidence.main(["--task", str(tmp_path / "pairs.jsonl"), "--model", "none", "--docs", str(page)])
    with pytest.raises(SystemExit):
        evidence.main(["--rows", "nonsense"])


def test_every_setting_is_one_of_gem_train():
    known = set(TrainConfig.model_fields)
    for row in objectives.OBJECTIVES:
        assert set(row.changes) <= known


def test_a_curve_is_the_mean_of_the_steps_that_all_seeds_have():
    points = [
        [{"step": 0, "x": 1.0}, {"step": 1}, {"step": 2, "x": 5.0}],
        [{"step": 0, "x": 3.0}, {"step": 1, "x": 9.0}],
    ]
    assert curves.mean_curve(points, "x") == ([0], [2.0])
    assert curves.mean_curve(points[:1], "x") == ([0, 2], [1.0, 5.0])
    assert curves.mean_curve(points, "y") == ([], [])


@pytest.mark.parametrize("task", ["arithmetic", "arithmetic_fresh", "gsm8k_pairs"])
def test_the_tables_of_the_page_are_those_of_its_results(task):
    """But for the last digit, which rounding decides."""
    root = Path(evidence.__file__).parents[2]
    page, number = (root / "docs" / "evidence.md").read_text(), r"[+-]?\d+\.\d+"
    found = tables.all_tables(root / "bench" / "results" / "evidence" / task, 3)
    marked = [name for name in tables.TABLES if f"<!-- {task} {name} -->" in page]
    assert marked and set(marked) <= set(found)
    for name in marked:
        table = found[name]
        shown = page.partition(f"<!-- {task} {name} -->\n")[2].partition(f"<!-- /{task} {name} -->")[0]
        assert re.sub(number, "", shown) == re.sub(number, "", table)
        pairs = zip(re.findall(number, shown), re.findall(number, table), strict=True)
        assert max(abs(float(one) - float(other)) for one, other in pairs) < 0.0015
