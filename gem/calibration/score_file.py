"""score.json: a calibrated score and what is known of its worth, typed; written atomically, read with suspicion."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gem.calibration.features import FEATURES
from gem.errors import UserError
from gem.statistics import Estimate
from gem_kernels import read_score_file

KIND = "gem-score"
VERSION = 1

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
FeatureName = Literal[FEATURES]  # type: ignore[valid-type]


class _Part(BaseModel):
    """Exactly these keys, exactly these types, finite numbers, never changed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, revalidate_instances="always"
    )


class Verdict(_Part):
    """May the score be trusted? `words` say how strong or weak it is, with value, interval and number of pairs."""

    kind: Literal["informative", "not_informative", "explained_by_length"]
    words: str


class Platt(_Part):
    """P(right) = sigma(slope * score + intercept), fitted on `count` of the model's own samples."""

    slope: Positive
    intercept: float
    count: Count


class Roc(_Part):
    """Points of a ROC curve from (0, 0) to (1, 1)."""

    false_positive: list[Share]
    true_positive: list[Share]


class ReliabilityBin(_Part):
    """Samples of like predicted probability: how many, the mean probability, the share that was right."""

    count: Count
    confidence: Share
    share_right: Share


class Samples(_Part):
    """The scores on the model's own samples, by the name of the score; see `gem.calibration.samples`."""

    auroc_within: dict[str, Estimate]
    auroc_over: dict[str, Estimate]
    best_of: dict[str, Estimate]
    difference: dict[str, Estimate]  # best_of minus single
    single: Estimate
    majority: Estimate
    any: Estimate
    weighted_majority: dict[str, Estimate]
    num_prompts: Count
    num_generations: Count
    roc_within: Roc
    reliability: list[ReliabilityBin]


class Score(_Part):
    """S(a) = sum over features of weights / scales * x(a), and how it was found: the content of score.json.

    Example:
        score = read_score("score.json")
        names, weights = score.linear
        values = linear_score(features, names, weights)         # features [..., 9] -> [...], higher is better
    """

    kind: Literal["gem-score"] = KIND
    version: Literal[1] = VERSION
    features: list[FeatureName] = Field(min_length=1)
    weights: dict[FeatureName, float]
    weight_intervals: dict[FeatureName, tuple[float, float]]
    scales: dict[FeatureName, Positive]
    top_m: Annotated[float, Field(gt=0, le=1)] | Annotated[int, Field(ge=1)]
    l2: Positive
    model: str
    pairs_hash: str
    num_pairs: Count
    num_prompts: Count
    verdict: Verdict
    pair_accuracy: dict[str, Estimate]
    platt: Platt | None
    samples: Samples | None
    # May be missing: scores of before they were there.
    scales_from: Literal["candidates", "pairs"] = "pairs"
    fitted_to: Literal["candidates", "pairs"] = "pairs"

    @model_validator(mode="after")
    def _one_entry_a_feature(self) -> Score:
        if len(set(self.features)) < len(self.features):
            raise ValueError("features: a name is given twice")
        for key in ("weights", "weight_intervals", "scales"):
            if set(getattr(self, key)) != set(self.features):
                raise ValueError(f"{key}: its names are not those of features")
        return self

    @property
    def linear(self) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """(names, weights / scales): what a linear score of raw features needs."""
        return tuple(self.features), tuple(self.weights[name] / self.scales[name] for name in self.features)


def hash_pairs(pairs: Iterable[Any]) -> str:
    """ "sha256:..." of the pairs as JSON, one a line, in their order: tells whether a score was fitted on these."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps(pair, ensure_ascii=True, sort_keys=True).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def write_score(score: Score, path: str | Path) -> Path:
    """Writes beside `path`, flushes, and renames: a name that exists is a whole file. An old file is replaced."""
    path = Path(path).expanduser()
    Score.model_validate(score)  # a field made without checks (`model_construct`, a plain Estimate) is checked here
    text = json.dumps(score.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"
    part = path.with_name(f".{path.name}.part")
    try:
        try:
            with open(part, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def read_score(path: str | Path) -> Score:
    """The score in the file, or one `UserError` that says what is wrong with it. Nothing in the file is run."""
    try:
        found = read_score_file(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        return Score.model_validate_json(json.dumps(found.content))
    except ValidationError as error:
        raise UserError(f"{found.path}: {_first_problem(error)}; make it anew with gem calibrate") from error


def _first_problem(error: ValidationError) -> str:
    """ "samples.single.value: input should be a finite number, got inf": the first of them, in one line."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("[key]",))
    words = first["msg"].removeprefix("Value error, ").replace("\n", " ")
    if first["type"] in ("missing", "value_error"):
        return f"{where}: {words.lower()}" if where else words
    return f"{where}: {words[:1].lower()}{words[1:]}, got {_short(first['input'])}"


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 60 else f"{words[:57]}..."
