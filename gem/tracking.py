"""Where the numbers of a run go: metrics.jsonl always, TensorBoard, trackio and wandb on request, samples as a table.

Only the main process writes. A run that is resumed cuts both JSONL files back to where its checkpoint left them, so
that they hold every step once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from gem import distributed
from gem.config import TrainConfig
from gem.errors import UserError
from gem.filtering import ScoredRollout

METRICS, COMPLETIONS = "metrics.jsonl", "completions.jsonl"


class Sink(Protocol):
    """A service beside metrics.jsonl."""

    def write(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line, each written through as it comes; a number that is not finite is null.

    offset: bytes to keep of a file that is there.
    """

    def __init__(self, path: Path, offset: int | None = None) -> None:
        if offset is not None:
            size = path.stat().st_size if path.exists() else 0
            if size < offset:
                raise UserError(f"resume: {path} is shorter than the checkpoint says ({size} of {offset} bytes)")
            if size > offset:
                os.truncate(path, offset)
        self.path = path
        self.file = path.open("ab")

    @property
    def offset(self) -> int:
        return self.file.tell()

    def write(self, row: dict[str, Any]) -> None:
        row = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        try:
            self.file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; continue with --resume") from error

    def sync(self) -> None:
        """Onto the disk: a checkpoint must not know of lines that a power cut takes back."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


class Tracker:
    """`write` a row of numbers, `samples` for a table of completions; `offsets` and `close`."""

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        console: Console,
        *,
        offsets: dict[str, int] | None = None,
        step: int = 0,
    ) -> None:
        """offsets, step: of the checkpoint that the run continues from."""
        self.console = console
        self.files: dict[str, JsonLines] = {}
        self.sinks: list[Sink] = []
        if not distributed.is_main():
            return
        for name in (METRICS, COMPLETIONS) if config.log_completions_steps else (METRICS,):
            self.files[name] = JsonLines(run_dir / name, None if offsets is None else offsets.get(name, 0))
        self.sinks = [_SINKS[name](config, run_dir, step if offsets else 0) for name in config.report_to]

    @property
    def offsets(self) -> dict[str, int]:
        """Bytes of each file, safe on the disk."""
        for file in self.files.values():
            file.sync()
        return {name: file.offset for name, file in self.files.items()}

    def write(self, row: dict[str, Any], total_steps: int) -> None:
        """One line; its numbers go to the services as well, at `total_steps` optimizer steps of the run."""
        if not self.files:
            return
        self.files[METRICS].write(row)
        prefix = {"eval": "", "SFT": "sft/"}.get(row["stage"], "train/")
        values = {
            prefix + key: float(value)
            for key, value in row.items()
            if isinstance(value, int | float) and key not in ("step", "total_steps")
        }
        for sink in self.sinks:
            sink.write(values, total_steps)

    def samples(self, scored: ScoredRollout, prompts: Sequence[str], step: int) -> None:
        """All candidates of a step to completions.jsonl, and a table of the first prompts' on the console."""
        if COMPLETIONS not in self.files:
            return
        rows = completion_rows(scored, prompts, step)
        for row in rows:
            self.files[COMPLETIONS].write(row)
        self.console.print(completion_table(rows[: 2 * scored.rollout.batch.num_generations], step))

    def close(self) -> None:
        for closable in (*self.files.values(), *self.sinks):
            closable.close()


def check_report_to(names: Sequence[str]) -> None:
    """Raises for the first service that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"report_to: {name} is not installed: pip install {name}, or leave it out")


def completion_rows(scored: ScoredRollout, prompts: Sequence[str], step: int) -> list[dict[str, Any]]:
    rollout, scores = scored.rollout, scored.scores
    size = rollout.batch.num_generations
    return [
        {
            "step": step,
            "prompt": prompts[i // size],
            "completion": rollout.texts[i],
            "answer": rollout.spans.answers[i],
            "score": float(scores.score[i]),
            "h_final": float(scores.final_entropy[i]),
            "h_fork": float(scores.fork_entropy[i]),
            "advantage": float(scored.advantages[i]),
            "valid": bool(scores.valid[i]),
            "truncated": bool(rollout.truncated[i]),
        }
        for i in range(len(rollout.texts))
    ]


def completion_table(rows: Sequence[dict[str, Any]], step: int) -> Table:
    table = Table(title=f"Samples, step {step}", title_justify="left")
    table.add_column("prompt", ratio=2)
    table.add_column("completion", ratio=3)
    for name in ("score", "advantage"):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in rows:
        prompt = "" if row["prompt"] == last else _short(row["prompt"])
        last = row["prompt"]
        table.add_row(prompt, _short(row["completion"]), f"{row['score']:.3f}", f"{row['advantage']:+.3f}")
    return table


def _short(text: str, most: int = 160) -> str:
    """One line; rich reads brackets as markup, so they are escaped."""
    words = " ".join(text.split())
    words = words if len(words) <= most else words[: most // 2] + " … " + words[-most // 2 :]
    return words.replace("[", "\\[")


class _TensorBoard:
    def __init__(self, config: TrainConfig, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was logged beyond the checkpoint is dropped when the files are read.
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class _Service:
    """trackio and wandb, which share this much of their interface."""

    name: str

    def __init__(self, config: TrainConfig, run_dir: Path, step: int) -> None:
        self.module = importlib.import_module(self.name)
        self.module.init(project="gem", name=run_dir.name, config=dataclasses.asdict(config), **self.options(run_dir))

    def options(self, run_dir: Path) -> dict[str, Any]:
        return {}

    def write(self, values: dict[str, float], step: int) -> None:
        self.module.log(values, step=step)

    def close(self) -> None:
        self.module.finish()


class _Trackio(_Service):
    name = "trackio"

    def options(self, run_dir: Path) -> dict[str, Any]:
        return {"resume": "allow"}


class _Wandb(_Service):
    name = "wandb"

    def options(self, run_dir: Path) -> dict[str, Any]:
        return {"dir": str(run_dir), "id": run_id(run_dir), "resume": "allow"}


def run_id(run_dir: Path) -> str:
    """The same for a run that is resumed, another for every other directory."""
    return hashlib.blake2b(str(run_dir.resolve()).encode(), digest_size=8).hexdigest()


_SINKS: dict[str, type] = {"tensorboard": _TensorBoard, "trackio": _Trackio, "wandb": _Wandb}
