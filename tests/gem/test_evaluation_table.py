"""The table of evaluations: whole at 80 columns, with all that was measured, and no number that means another."""

import dataclasses
import io
import math
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gem.evaluation.evaluate import AnswerAccuracy, CandidateScores, Evaluation, PreferenceAccuracy, SampledAnswers
from gem.evaluation.report import evaluation_metrics, evaluation_table
from gem.statistics import Calibration, Estimate


def evaluation(seed, *, score=0.5, auroc=True, sampled=True, fitted=False):
    """Numbers that differ from row to row and from stage to stage."""
    step = iter(range(1, 100))

    def estimate(count=128):
        value = (100 * seed + next(step)) / 1000
        return Estimate(value, value - 0.0004, value + 0.5, count)

    preference, answers, pairs = estimate(1319), estimate(64), estimate(1319)
    preferred = PreferenceAccuracy(preference.value, preference.low, preference.high, 1319, 1.0, 0.5, 1.5)
    mean = PreferenceAccuracy(0.4321, 0.2, 0.6, 1319, 1.0, 0.5, 1.5)
    within, overall = (estimate(), estimate()) if auroc else (None, None)
    found = SampledAnswers(estimate(), estimate(16), estimate(16), overall, within)
    means = CandidateScores(score, 0.1, 0.2, 64, 0.9, 71.25, 0.1, None)
    return Evaluation(
        preference=preferred, preferences={"sum": preferred, "mean": mean}, calibration=Calibration(pairs, pairs, ()),
        answers=AnswerAccuracy(answers.value, answers.low, answers.high, 64, 0.9) if sampled else None,
        candidates=means if sampled else None, sampled=found if sampled else None, logprobs=torch.zeros(1, 2),
        seconds=1.0, score=estimate(1319), score_is_fitted=fitted,
    )  # fmt: skip


def table(evaluations, width=80):
    console = Console(file=io.StringIO(), width=width, markup=False)
    console.print(evaluation_table(evaluations))
    return console.file.getvalue()


def row(text, name):
    """The cells of the row that begins with `name`, and those of the interval below it."""
    lines = text.splitlines()
    (place,) = [i for i, line in enumerate(lines) if line.startswith(name)]
    return lines[place].removeprefix(name).split()[-3:], lines[place + 1].replace(", ", ",").split()


STAGES = {"start": evaluation(1), "SFT": evaluation(2), "rejection sampling": evaluation(3)}


def test_nothing_is_cut_at_80_columns():
    text = table(STAGES)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    heading = " ".join(text.split("preference accuracy")[0].split())
    assert all(word in heading for word in ("start", "SFT", "rejection", "sampling"))
    for result in STAGES.values():
        for value in (result.preference, result.answers, result.sampled.accuracy, result.sampled.auroc_within):
            assert f"[{value.low:.3f}, {value.high:.3f}]" in text
    narrow = table(STAGES, 60)  # folded, not cut
    assert "…" not in narrow and all(f"{result.sampled.auroc.high:.3f}]" in narrow for result in STAGES.values())


@pytest.mark.parametrize(
    "name, of",
    [
        ("right, one sample (128)", lambda e: e.sampled.accuracy),
        ("right, best by score (16)", lambda e: e.sampled.best_score),
        ("right, majority (16)", lambda e: e.sampled.majority),
        ("AUROC within a prompt (128)", lambda e: e.sampled.auroc_within),
        ("AUROC over all (128)", lambda e: e.sampled.auroc),
        ("score prefers chosen (1319)", lambda e: e.score),
    ],
)
def test_what_keep_best_and_the_page_go_by_is_there(name, of):
    values, intervals = row(table(STAGES), name)
    assert values == [f"{of(e).value:.3f}" for e in STAGES.values()]
    assert intervals == [f"[{of(e).low:.3f},{of(e).high:.3f}]" for e in STAGES.values()]


def test_what_was_not_measured_has_no_row():
    text = table({"start": evaluation(1, sampled=False)})
    assert "preference accuracy (1319)" in text
    assert not any(word in text for word in ("right", "AUROC", "mean score", "tokens", "pairs decided"))
    text = table({"start": evaluation(1, sampled=False), "SFT": evaluation(2, auroc=False), "DPO": evaluation(3)})
    assert row(text, "AUROC over all (128)")[0][:2] == ["-", "-"] and row(text, "right, majority (16)")[0][0] == "-"


def test_scores_of_two_kinds_do_not_stand_in_one_row():
    stages = {"start": evaluation(1, score=0.378), "SFT": evaluation(2, score=0.39)}
    text = table({**stages, "rejection sampling": evaluation(3, score=-0.008, fitted=True)})
    assert row(text, "mean score S")[0] == ["-", "-", "-0.008"]
    assert "before one is calibrated the score is the published one" in " ".join(text.split())
    one = table({**stages, "rejection sampling": evaluation(3, score=0.4)})
    assert row(one, "mean score S")[0] == ["0.378", "0.390", "0.400"] and "calibrated" not in one
    given = {name: evaluation(i, score=-0.1, fitted=True) for i, name in enumerate(("start", "SFT", "SEGA"))}
    assert row(table(given), "mean score S")[0] == ["-0.100"] * 3 and "calibrated" not in table(given)


def test_a_mean_of_nothing_is_a_dash():
    text = table({**STAGES, "SFT": evaluation(2, score=math.nan)})
    assert "nan" not in text and row(text, "mean score S")[0] == ["0.500", "-", "0.500"]


def test_the_names_in_the_docs_are_those_of_the_metrics():
    result = evaluation(1)
    result = dataclasses.replace(
        result, preferences=dict.fromkeys(("sum", "mean", "relative"), result.preference),
        candidates=dataclasses.replace(result.candidates, pairs_decided=0.5),
    )  # fmt: skip
    text = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
    table = text.partition("Evaluations have names of their own")[2].partition("| name | meaning |")[2]
    named = set(re.findall(r"`(eval/[a-z_/]+)`", table))
    starred = set(re.findall(r"`(eval/[a-z_/]+)` \*", table))
    assert len(starred) == 8
    assert named | {f"{name}_{end}" for name in starred for end in ("low", "high")} == set(evaluation_metrics(result))
