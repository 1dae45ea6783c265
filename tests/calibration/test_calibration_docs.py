"""The code that docs/calibration.md shows runs as it stands, and its words name what is there."""

import re
from pathlib import Path

import numpy as np
import pytest

from gem.calibration import fit, verdict
from gem.calibration.features import FEATURES

TEXT = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text()


def test_the_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    chosen, rejected = np.random.default_rng(0).normal(size=(2, 20, 9))
    chosen[:, FEATURES.index("mean_logprob")] += 2
    names = {"chosen": chosen, "rejected": rejected, "prompts": range(20), "pairs": [["q", "a", "b"]]}
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    exec(code, names | {"features": chosen}, names)
    assert names["scores"].shape == (20,) and capsys.readouterr().out.startswith("Informative")
    assert names["scores"][0] - chosen[0, [0, 1, 3, 5]] @ names["weights"] == pytest.approx(0, abs=1e-12)


def test_its_numbers_are_those_of_the_code():
    assert all(f"`{name}`" in TEXT for name in FEATURES)
    strengths = ", ".join(f"{s:g}" for s in sorted(fit.STRENGTHS))
    assert f"one of {strengths}:" in TEXT and f"exceed {fit.MAX_HELD_OUT:,}" in TEXT
    assert f"fewer than {verdict.MIN_PROMPTS} prompts" in TEXT
    assert f"weak below {verdict.MODERATE}, moderate below {verdict.STRONG}" in TEXT
    assert f"where there are {verdict.MIN_HELD_OUT} of them" in TEXT
