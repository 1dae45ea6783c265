"""score.json as gem_kernels reads it; what `gem calibrate` writes is read in tests/calibration."""

import json

import pytest

from gem_kernels import LinearScore, read_score_file

CONTENT = {
    "kind": "gem-score", "version": 1, "weights": {"mean_logprob": 1.5, "final_entropy": -0.5},
    "scales": {"mean_logprob": 0.25, "final_entropy": 2.0}, "top_m": 0.2, "more": [1],
    "verdict": {"kind": "informative", "words": ""},
}  # fmt: skip


def written(folder, **changes):
    path = folder / "score.json"
    path.write_text(json.dumps({**CONTENT, **changes}))
    return path


def test_what_is_read(tmp_path):
    found = read_score_file(str(written(tmp_path)))
    assert found.linear == LinearScore(CONTENT["weights"], CONTENT["scales"]) and found.top_m == 0.2
    assert found.linear.coefficient("mean_logprob") == 6.0 and found.doubts is None and found.content == CONTENT
    found = read_score_file(written(tmp_path, top_m=4, verdict={"kind": "not_informative", "words": "Chance."}))
    assert found.top_m == 4 and found.doubts == "Chance."


@pytest.mark.parametrize(
    "change,part,words",
    [
        ({"weights": {"charm": 1.0}}, "linear", "`weights` must name features among"),
        ({"weights": None}, "linear", "`weights` must be a mapping"),
        ({"scales": {"mean_logprob": 0.0}}, "linear", "`scales` must hold finite numbers above 0"),
        ({"top_m": 1.5}, "top_m", "`top_m` must be a share"),
        ({"top_m": None}, "top_m", "`top_m` must be a share"),
        ({"verdict": "good"}, "doubts", "`verdict` must have kind and words"),
    ],
)
def test_parts_that_are_wrong(change, part, words, tmp_path):
    found = read_score_file(written(tmp_path, **change))
    with pytest.raises(ValueError, match=words) as error:
        getattr(found, part)
    assert str(error.value).startswith(str(found.path)) and str(error.value).endswith("gem calibrate")


@pytest.mark.parametrize(
    "text,words",
    [
        ("[1]", "not a score"),
        ('{"kind": "gem-score", "version": 2}', "expected version 1 of the format, got 2"),
        ('{"kind": "gem-score", "kind": "x"}', "the key 'kind' is given twice"),
        ('{"kind": NaN}', "NaN is not a finite number"),
        ("{", "not JSON"),
    ],
)
def test_files_that_are_no_score(text, words, tmp_path):
    path = tmp_path / "score.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        read_score_file(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cannot read it: No such file"):
        read_score_file(tmp_path / "none.json")
