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

KIND = "gem-score"
VERSION = 1
MAX_BYTES = 8 << 20

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
    path = Path(path).expanduser()
    text = _read_text(path)
    try:
        content = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        words = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{path}: not JSON: {words}; make it anew with gem calibrate") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise UserError(f'{path}: not a score: expected "kind": "{KIND}"; give the score.json of gem calibrate')
    if content.get("version") != VERSION or isinstance(content["version"], bool):
        raise UserError(
            f"{path}: expected version {VERSION} of the format, got {_short(content.get('version'))}; "
            "make it anew with gem calibrate"
        )
    try:
        return Score.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error)}; make it anew with gem calibrate") from error


def _read_text(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror or error}; give a score.json") from error
    if len(raw) > MAX_BYTES:
        raise UserError(
            f"{path}: larger than {MAX_BYTES >> 20} MiB, so not a score; give the score.json of gem calibrate"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text, so not a score; give the score.json of gem calibrate") from error


def _without_repeats(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        names = [name for name, _ in items]
        raise ValueError(f"the key {_short(next(n for n in names if names.count(n) > 1))} is given twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a finite number")


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
