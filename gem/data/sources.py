"""Rows from a file or a dataset, each with the place it stands at, and one report of all that cannot be used."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gem.config.settings import RowSettings
from gem.errors import UserError, one_line, path_of

# A report lists so many rows in full; of more it says how many.
_MAX_LISTED = 50
# What ends like these is a file, never the id of a dataset on the hub.
_SUFFIXES = (".gz", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
# Behind the name of a split: a slice of it, or another one.
_SLICED = re.compile(r"[\[(+]")


@dataclass(frozen=True)
class Row:
    """One row and where it stands: "pairs.jsonl:3" (lines count from 1) or "org/name[train] row 0" (rows from 0)."""

    where: str
    values: dict[str, Any] | str  # a string in place of the values says what is wrong


@dataclass(frozen=True)
class GivenRows:
    """Rows that are there, a list of dictionaries or a datasets.Dataset, and what messages call them."""

    name: str
    rows: Sequence[Any]

    def __str__(self) -> str:
        return self.name


Source = str | Path | GivenRows


@dataclass(frozen=True)
class RowProblem:
    where: str
    kind: Literal["bad", "duplicate", "overlong"]
    what: str


@dataclass(frozen=True)
class RowReport:
    """All problems of one source, in the order of its rows."""

    source: str
    num_rows: int
    problems: tuple[RowProblem, ...]
    settings: RowSettings

    def raise_refused(self) -> None:
        """One `UserError` that lists every row whose kind of problem the settings do not let pass."""
        refused = [p for p in self.problems if getattr(self.settings, f"{p.kind}_rows") == "error"]
        if not refused:
            return
        if len(refused) == 1:
            raise UserError(f"{refused[0].where}: {refused[0].what}")
        skips = self.settings.how_to_skip(dict.fromkeys(p.kind for p in refused))
        lines = [f"{self.source}: {len(refused)} of {self.num_rows} rows cannot be used; correct them, or {skips}"]
        lines += [f"  {p.where}: {p.what}" for p in refused[:_MAX_LISTED]]
        if len(refused) > _MAX_LISTED:
            lines.append(f"  ... and {len(refused) - _MAX_LISTED} more")
        raise UserError("\n".join(lines))

    def counts(self) -> dict[str, int]:
        """How many rows were left out, by kind; kinds of which there are none are not in it."""
        kinds = [p.kind for p in self.problems if getattr(self.settings, f"{p.kind}_rows") == "skip"]
        return {kind: kinds.count(kind) for kind in ("bad", "duplicate", "overlong") if kind in kinds}

    def __str__(self) -> str:
        """One line on what was left out; empty where every row is used."""
        counts = self.counts()
        if not counts:
            return ""
        first = next(p for p in self.problems if getattr(self.settings, f"{p.kind}_rows") == "skip")
        parts = ", ".join(f"{number} {kind}" for kind, number in counts.items())
        return (
            f"{self.source}: left out {sum(counts.values())} of {self.num_rows} rows ({parts}); "
            f"the first: {first.where}: {first.what}"
        )


def read_rows(source: Source, split: str = "train") -> list[Row]:
    """Every row of a file (JSONL, JSON, CSV, TSV, each also as .gz; Parquet), of a `save_to_disk` directory, of a
    dataset on the hub, or of those given.

    A file has no split. A hub id may name a configuration ("openai/gsm8k:main"), `split` of a dataset may be a slice
    ("test[:100]"). Raises `UserError` where the source as a whole cannot be read.
    """
    if isinstance(source, GivenRows):
        return [Row(f"{source} row {i}", _object(row)) for i, row in enumerate(source.rows)]
    path = path_of(source, "data")
    if path.is_file():
        readers = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet, ".json": _read_json}
        suffix = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
        return readers.get(suffix.lower(), _read_json_lines)(path)
    if path.is_dir():
        return _saved_dataset(path, split)
    check_source(source)
    return _hub_dataset(str(source), split)


def check_source(source: Source) -> None:
    """Raises where `source` names a file or directory that is not there. Reads nothing, asks no hub."""
    if isinstance(source, GivenRows):
        return
    path = path_of(source, "data")
    named = path.is_absolute() or path.suffix.lower() in _SUFFIXES or str(source).startswith((".", "~"))
    if named and not path.exists():
        raise UserError(f"{source}: cannot read it: no such file or directory")


def _read_bytes(path: Path) -> bytes:
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not a whole gzip file: {one_line(error)}; compress it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from error


def _read_json_lines(path: Path) -> list[Row]:
    lines = enumerate(_read_bytes(path).split(b"\n"), 1)
    return [Row(f"{path}:{number}", _parse_line(line)) for number, line in lines if line.strip()]


def _read_json(path: Path) -> list[Row]:
    """A .json file: one array of objects, or lines of them."""
    data = _read_bytes(path)
    if not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return _read_json_lines(path)
    try:
        rows = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON ({_why_not_json(error)})") from error
    return [Row(f"{path} row {i}", _object(row)) for i, row in enumerate(rows)]


def _read_csv(path: Path) -> list[Row]:
    """Rows under the header's names; an empty cell is None. A row is at the line where it ends."""
    try:
        text = _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: save the file as UTF-8") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if ".tsv" in path.name.lower()[-7:] else ",")
    rows = []
    try:
        for values in reader:
            if None in values:
                values = f"{len(reader.fieldnames or ())} cells are expected, got more: quote those that hold commas"
            else:
                values = {key: value or None for key, value in values.items()}
            rows.append(Row(f"{path}:{reader.line_num}", values))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV: {error}") from error
    return rows


def _read_parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot read it: {one_line(error)}") from error
    return [Row(f"{path} row {i}", row) for i, row in enumerate(rows)]


def _saved_dataset(path: Path, split: str) -> list[Row]:
    datasets = _datasets(path)
    if not any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json")):
        raise UserError(f"{path}: no saved dataset in this directory: name a file, or write one with save_to_disk")
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a foreign file breaks with
        raise UserError(f"{path}: cannot read it: {one_line(error)}") from error
    if not isinstance(found, datasets.DatasetDict):
        if not _SLICED.search(split):  # it is one split, whatever its name
            return [Row(f"{path} row {i}", dict(row)) for i, row in enumerate(found)]
        found = {_SLICED.split(split)[0]: found}
    chosen = found[split] if split in found else _sliced(datasets, found, split, path)
    return [Row(f"{path}[{split}] row {i}", dict(row)) for i, row in enumerate(chosen)]


def _sliced(datasets: Any, found: Mapping[str, Any], split: str, path: Path) -> list[Any]:
    """Rows of "train[:100]", "train[50%:]", "train+test[:9]", as `datasets` reads it of the hub."""
    sizes = {name: len(rows) for name, rows in found.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        slice_ = f"{next(iter(found))}[:100]"
        raise UserError(f"{path}: no split {split!r}; it has {', '.join(found)}; a slice is {slice_}") from error
    return [row for part in parts for row in found[part.splitname].select(range(part.from_, part.to))]


def _hub_dataset(source: str, split: str) -> list[Row]:
    datasets = _datasets(source)
    name, _, configuration = source.partition(":")
    try:
        found = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # not found, no network, no such split or configuration, a broken file
        raise UserError(
            f"{source}: neither a file nor a directory, and as a dataset (split {split!r}) it cannot be loaded: "
            f"{one_line(error)}"
        ) from error
    return [Row(f"{source}[{split}] row {i}", dict(row)) for i, row in enumerate(found)]


def _datasets(source: str | Path):
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source}: reading a dataset needs the datasets library: pip install datasets") from error
    return datasets


def _parse_line(line: bytes) -> dict[str, Any] | str:
    try:
        return _object(json.loads(line.decode("utf-8-sig")))
    except UnicodeDecodeError:
        return "not UTF-8: save the file as UTF-8"
    except json.JSONDecodeError as error:
        return f"not valid JSON ({error.msg} at column {error.colno}): write one complete JSON object per line"
    except (RecursionError, ValueError) as error:
        return f"not valid JSON ({_why_not_json(error)}): write one complete JSON object per line"


def _why_not_json(error: Exception) -> str:
    """Of what is JSON by its grammar, but no value of Python's."""
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of more than 4,300 digits"


def _object(row: Any) -> dict[str, Any] | str:
    if isinstance(row, dict):
        return row
    return f"a JSON object is expected, got {type(row).__name__}: write one complete JSON object per line"


def text_problem(name: str, value: Any) -> str | None:
    """What keeps the value of column `name` from being a usable text, or None."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return f'"{name}" is empty: fill it in or delete this line'
    if not isinstance(value, str):
        return f'"{name}" must be text, got {type(value).__name__}: put it in quotes'
    if any("\ud800" <= c <= "\udfff" for c in value):
        return f'"{name}" holds half a character (a lone \\ud8xx escape): correct it or delete this line'
    return None


def answer_problem(name: str, value: Any) -> str | None:
    """What keeps a known final answer (text, a number or nothing) from being usable, or None."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        return f'"{name}" must be text or a number, got {type(value).__name__}: correct it or leave it out'
    if isinstance(value, str) and not value.strip():
        return f'"{name}" is empty: fill it in or leave it out'
    return None


def report(source: Source, rows: Sequence[Row], problems: Sequence[RowProblem], settings: RowSettings) -> RowReport:
    """The problems in the order of the rows, as a report that has let pass what the settings let pass."""
    place = {row.where: i for i, row in enumerate(rows)}
    made = RowReport(str(source), len(rows), tuple(sorted(problems, key=lambda p: place[p.where])), settings)
    made.raise_refused()
    return made
