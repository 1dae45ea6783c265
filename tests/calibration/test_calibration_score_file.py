"""score.json: what is written comes back, and what is not a score is refused in one line."""

import io
import json
import math
import os

import numpy as np
import pytest
from rich.console import Console

from gem.calibration.fit import calibrate
from gem.calibration.probability import fit_platt
from gem.calibration.samples import evaluate_samples
from gem.calibration.score_file import Score, hash_pairs, read_score, write_score
from gem.errors import UserError
from gem.report.score_table import score_report
from gem.statistics import Estimate

KEYS = [
    *("kind", "version", "features", "weights", "weight_intervals", "scales", "top_m", "l2", "model", "pairs_hash"),
    *("num_pairs", "num_prompts", "verdict", "pair_accuracy", "platt", "samples"),
]
SAMPLE_KEYS = [
    *("auroc_within", "auroc_over", "best_of", "difference", "single", "majority", "any", "weighted_majority"),
    *("num_prompts", "num_generations", "roc_within", "reliability"),
]


@pytest.fixture(scope="module")
def whole():
    rng = np.random.default_rng(0)
    better, worse = rng.normal(size=(2, 12, 9))
    better[:, 5] += 2
    correct = rng.random((10, 4)) < 0.4
    scores = correct + rng.normal(size=(10, 4))
    valid = np.ones((10, 4), bool)
    answers = [["1" if right else "2" for right in row] for row in correct]
    samples = evaluate_samples({"calibrated": scores, "paper": -scores}, correct, answers, valid)
    fitted = calibrate(better, worse, range(12))
    return fitted.score(
        model="runs/sft", pairs_hash=hash_pairs(["a"]), platt=fit_platt(scores, correct, valid), samples=samples
    )


@pytest.fixture
def content(whole):
    return json.loads(whole.model_dump_json())


def refused(path, text, words):
    path.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        read_score(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value) and len(str(error.value)) < 400


def test_round_trip(whole, tmp_path):
    path = write_score(whole, tmp_path / "score.json")
    assert read_score(path) == whole and read_score(str(path)).linear == whole.linear
    again = write_score(read_score(path), tmp_path / "again.json")
    assert again.read_bytes() == path.read_bytes()
    alone = whole.model_copy(update={"platt": None, "samples": None, "top_m": 3})
    write_score(alone, path)  # over the old one
    assert read_score(path) == alone and read_score(path).top_m == 3 and isinstance(read_score(path).top_m, int)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.json", "score.json"]


def test_the_format_is_as_promised(content):
    assert (
        list(content) == [*KEYS, "scales_from", "fitted_to"]
        and content["kind"] == "gem-score"
        and content["version"] == 1
    )
    assert list(content["samples"]) == SAMPLE_KEYS
    assert list(content["verdict"]) == ["kind", "words"] and list(content["platt"]) == ["slope", "intercept", "count"]
    assert list(content["pair_accuracy"]["calibrated"]) == ["value", "low", "high", "count"]
    assert list(content["samples"]["roc_within"]) == ["false_positive", "true_positive"]
    assert list(content["samples"]["reliability"][0]) == ["count", "confidence", "share_right"]
    assert (
        list(content["weights"])
        == content["features"]
        == ["final_entropy", "fork_entropy", "mean_entropy", "mean_logprob"]
    )
    assert len(content["weight_intervals"]["fork_entropy"]) == 2 and content["top_m"] == 0.1


def test_linear(whole):
    names, weights = whole.linear
    assert names == ("final_entropy", "fork_entropy", "mean_entropy", "mean_logprob")
    assert weights == tuple(whole.weights[n] / whole.scales[n] for n in names)


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key(content, tmp_path, key):
    del content[key]
    refused(tmp_path / "score.json", json.dumps(content), key)


def nested(path, value):
    def change(content):
        *parts, last = path.split("/")
        for part in parts:
            content = content[int(part)] if isinstance(content, list) else content[part]
        content[last] = value

    return change


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("kind", "other", 'not a score: expected "kind": "gem-score"'),
        ("version", 2, "expected version 1 of the format, got 2"),
        ("version", True, "expected version 1"),
        ("features", [], "features: "),
        ("features", ["final_entropy", "fork_entropy", "charm"], r"features\.2: .*got 'charm'"),
        ("features", ["final_entropy"], "weights: its names are not those of features"),
        ("features", ["final_entropy", "fork_entropy", "mean_logprob", "fork_entropy"], "given twice"),
        ("weights/charm", 1.0, r"weights\.charm"),
        ("weights/fork_entropy", "1", r"weights\.fork_entropy: .*number, got '1'"),
        ("scales/fork_entropy", 0.0, r"scales\.fork_entropy: .*greater than 0"),
        ("scales", {"fork_entropy": 1.0}, "scales: its names"),
        ("weight_intervals/fork_entropy", [1.0], r"weight_intervals\.fork_entropy"),
        ("top_m", 0, "top_m"),
        ("top_m", 1.5, "top_m"),
        ("l2", -1.0, "l2: .*greater than 0"),
        ("l2", None, "l2: .*got None"),
        ("num_pairs", 1.5, "num_pairs: "),
        ("verdict/kind", "good", r"verdict\.kind: "),
        ("pair_accuracy/calibrated/value", True, r"pair_accuracy\.calibrated\.value: "),
        ("pair_accuracy/calibrated/more", 1, r"pair_accuracy\.calibrated\.more: "),
        ("platt/slope", 0.0, r"platt\.slope: "),
        ("samples/single", None, r"samples\.single: "),
        ("samples/reliability/0/confidence", 1.5, r"samples\.reliability\.0\.confidence: "),
        ("more", 1, "more: "),
    ],
)
def test_wrong_content(content, tmp_path, path, value, words):
    nested(path, value)(content)
    refused(tmp_path / "score.json", json.dumps(content), words)


@pytest.mark.parametrize("path", ["l2", "weights/fork_entropy", "samples/any/low", "pair_accuracy/paper/high"])
@pytest.mark.parametrize("value, words", [(math.nan, "NaN is not a finite"), (math.inf, "Infinity is not a finite")])
def test_numbers_that_are_not_finite(content, tmp_path, path, value, words):
    nested(path, value)(content)
    refused(tmp_path / "score.json", json.dumps(content), words)
    nested(path, 12345.5)(content)
    text = json.dumps(content)
    assert "12345.5" in text
    refused(tmp_path / "score.json", text.replace("12345.5", "1e999"), "finite number, got inf")


def test_text_that_is_no_json(content, tmp_path):
    path = tmp_path / "score.json"
    text = json.dumps(content)
    for wrong, words in [
        ("", "not JSON: Expecting value"),
        (text[:-5], "not JSON"),
        ("[1]", "not a score"),
        ("3", "not a score"),
        ("[" * 200_000, "nested too deeply"),
        (text.replace('"l2"', '"model": "other", "l2"'), "key 'model' is given twice"),
        ('{"kind": ' + "9" * 5000 + "}", "not JSON"),
    ]:
        refused(path, wrong, words)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_score(path)


def test_files_that_cannot_be_read(tmp_path, monkeypatch, content):
    with pytest.raises(UserError, match=r"none\.json: cannot read it: No such file"):
        read_score(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot read it: Is a directory"):
        read_score(tmp_path)
    huge = tmp_path / "huge.json"
    with open(huge, "wb") as file:
        file.truncate(1 << 40)  # sparse: a read of it all would not fit in memory
    with pytest.raises(UserError, match="larger than 8 MiB"):
        read_score(huge)


def test_a_failed_write_leaves_what_was_there(whole, tmp_path, monkeypatch):
    path = write_score(whole, tmp_path / "score.json")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*score\.json: No space left on device"):
        write_score(whole.model_copy(update={"l2": 2.0}), path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["score.json"]
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"cannot write .*No such file"):
        write_score(whole, tmp_path / "none" / "score.json")


def test_what_is_not_finite_is_not_written(whole, tmp_path):
    wrong = {"calibrated": Estimate(0.5, math.nan, 0.7, 3)}
    for change in ({"pair_accuracy": wrong}, {"l2": math.inf}):
        with pytest.raises(ValueError, match="finite"):
            write_score(whole.model_copy(update=change), tmp_path / "score.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="finite"):
        Score(**{**dict(whole), "pair_accuracy": wrong})


def test_the_hash_of_pairs():
    pairs = [["q", "a+", "a-"], [{"role": "user", "content": "ä"}, "b+", "b-"]]
    assert hash_pairs(pairs) == hash_pairs(tuple(tuple(pair) for pair in pairs)) != hash_pairs(pairs[::-1])
    assert hash_pairs([["ab", "c"]]) != hash_pairs([["a", "bc"]]) != hash_pairs(["a", "bc"])
    assert hash_pairs([]) == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_the_tables(whole):
    console = Console(width=110, record=True, file=io.StringIO())
    strange = whole.model_copy(update={"verdict": whole.verdict.model_copy(update={"words": "Not [red]informative"})})
    console.print(score_report(strange))
    text = console.export_text()
    accuracy = whole.pair_accuracy["calibrated"]
    assert f"{accuracy.value:.3f}" in text and f"[{accuracy.low:.3f}, {accuracy.high:.3f}]" in text
    assert "12 pairs; chance 0.5" in text and "calibrated, held out" in text and "paper's score" in text
    assert "-final_entropy" in text and "length (longer is better)" in text
    assert f"{whole.weights['mean_logprob']:+.3f}" in text and "10 prompts x 4" in text and "best of 4" in text
    assert f"{whole.samples.difference['calibrated'].value:+.3f}" in text
    assert f"{whole.samples.majority.value:.3f}" in text and f"{whole.samples.any.value:.3f}" in text
    assert text.rstrip().endswith("Not [red]informative")
    console.print(score_report(whole.model_copy(update={"samples": None})))
    assert "own samples" not in console.export_text()
