"""The score that candidates are judged by: the paper's, or that of a score.json with the probabilities it allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gem.calibration.probability import preference_probabilities, right_probabilities
from gem.calibration.score_file import Score, read_score
from gem.config.settings import Scoring
from gem.errors import UserError
from gem.scoring.score import ScoredRollout
from gem_kernels import LinearScore

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Scorer:
    """`score` None: the paper's S, whose scale means nothing, so that there are no probabilities."""

    scoring: Scoring
    score: Score | None = None
    linear: LinearScore | None = None

    def probabilities(self, scored: ScoredRollout, groups: list[range], sampled: bool) -> list[dict[str, float]]:
        """What each completion may be given, with `gem.calibration.probability`'s meaning:

        preference_probability    of being preferred among its group; where the group has two valid ones or more
        probability               of being right; of sampled ones alone, where score.json holds Platt's numbers

        Platt's numbers were fitted on samples of the model, so an answer written by others has none.
        """
        rows: list[dict[str, float]] = [{} for _ in scored.rollout.texts]
        if self.score is None:
            return rows
        values = scored.scores.score.double().numpy()
        valid = scored.scores.valid.numpy() & np.isfinite(values)
        for group in groups:
            if valid[group].sum() > 1:
                preferred = preference_probabilities(values[None, group], valid[None, group])[0]
                for i, value in zip(group, preferred.tolist()):
                    if valid[i]:
                        rows[i]["preference_probability"] = value
        if sampled and self.score.platt is not None:
            for i, value in enumerate(right_probabilities(self.score.platt, values).tolist()):
                if valid[i]:
                    rows[i]["probability"] = value
        return rows


def make_scorer(score: Score | str | Path | None, scoring: Scoring, model: str, warn: Warn) -> Scorer:
    """The scorer of a score.json (read and checked), or of the paper's score where there is none.

    A score that was fitted for another model, or that its own verdict does not trust, is one warning each.
    """
    if score is None:
        return Scorer(scoring)
    for key in ("final_weight", "fork_weight", "top_m"):
        if getattr(scoring, key) != Scoring.model_fields[key].default:
            raise UserError(f"{key}: expected none beside score, which has weights and top_m of its own; leave one out")
    name = "score" if isinstance(score, Score) else str(score)
    if not isinstance(score, Score):
        score = read_score(score)
    if not _same_model(score.model, model):
        warn(f"{name}: was fitted for {score.model}, not for {model}: its score and probabilities may not hold")
    if score.verdict.kind != "informative":
        warn(f"{name}: {score.verdict.words}")
    try:
        linear = LinearScore(score.weights, score.scales)
    except ValueError as error:
        raise UserError(f"{name}: {error}; make it anew with gem calibrate") from error
    return Scorer(scoring.changed(top_m=score.top_m), score, linear)


def _same_model(one: str, other: str) -> bool:
    """A name, or a path in another spelling."""
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()
