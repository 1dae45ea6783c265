"""score.json, the file of `gem calibrate`: read with suspicion, and what a `LinearScore` needs taken out of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from . import arguments
from .types import LinearScore

KIND = "gem-score"
VERSION = 1
MAX_BYTES = 8 << 20
AGAIN = "make it anew with gem calibrate"


@dataclass(frozen=True)
class ScoreFile:
    """A score.json: JSON of this kind and version. Its parts are looked at when they are asked for."""

    path: Path
    content: Mapping[str, Any]
    """All that is in the file."""

    @property
    def linear(self) -> LinearScore:
        """S = sum_f weights[f] / scales[f] * x_f. ValueError where weights or scales are not those of a LinearScore."""
        try:
            return LinearScore(*(self.content.get(name) for name in ("weights", "scales")))  # type: ignore[arg-type]
        except ValueError as error:
            self._fail(str(error))

    @property
    def top_m(self) -> float | int:
        """The `top_m` that its fork entropies were made with. ValueError where it is none."""
        top_m = self.content.get("top_m")
        try:
            arguments.check_top_m(top_m)
        except ValueError as error:
            self._fail(str(error))
        return top_m  # type: ignore[return-value]

    @property
    def doubts(self) -> str | None:
        """What `gem calibrate` says of a score that is no guide, in words; None where it found it informative."""
        verdict = self.content.get("verdict")
        if not isinstance(verdict, Mapping) or not {"kind", "words"} <= verdict.keys():
            self._fail("`verdict` must have kind and words")
        return None if verdict["kind"] == "informative" else str(verdict["words"])

    def _fail(self, words: str) -> NoReturn:
        raise ValueError(f"{self.path}: {words}; {AGAIN}") from None


def read_score_file(path: str | os.PathLike[str]) -> ScoreFile:
    """The score.json of `gem calibrate`, for trainers that use its score.

    Args:
        path: the file, at most 8 MiB. Nothing in it is run.

    Returns:
        ScoreFile: `linear` (a `LinearScore`), `top_m`, `doubts`, and `content`, all of the file.

    Raises:
        ValueError: the file cannot be read, is no JSON of this kind and version, names a key twice, or holds NaN or
            Infinity. One line, which begins with the path.

    Example:
        >>> found = read_score_file("score.json")
        >>> out = fused_entropy_score(logits, ids, completion_mask=mask, answer_start=start, group_size=8,
        ...                           score=found.linear, top_m=found.top_m)
    """
    path = Path(path).expanduser()
    try:
        content = json.loads(_text(path), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except _NotRead as error:
        raise ValueError(f"{path}: {error}") from error.__cause__
    except (ValueError, RecursionError) as error:
        words = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path}: not JSON: {words}; {AGAIN}") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ValueError(f'{path}: not a score: expected "kind": "{KIND}"; give the score.json of gem calibrate')
    if content.get("version") != VERSION or isinstance(content["version"], bool):
        got = arguments.shown(content.get("version"))[:60]
        raise ValueError(f"{path}: expected version {VERSION} of the format, got {got}; {AGAIN}")
    return ScoreFile(path, content)


class _NotRead(Exception):
    pass


def _text(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _NotRead(f"cannot read it: {error.strerror or error}; give a score.json") from error
    if len(raw) > MAX_BYTES:
        raise _NotRead(f"larger than {MAX_BYTES >> 20} MiB, so not a score; give the score.json of gem calibrate")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _NotRead("not UTF-8 text, so not a score; give the score.json of gem calibrate") from error


def _without_repeats(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        names = [name for name, _ in items]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {arguments.shown(repeated)[:60]} is given twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a finite number")
