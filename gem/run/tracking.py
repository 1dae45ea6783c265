"""Where the numbers of a run go: metrics.jsonl always, TensorBoard, trackio and wandb on request, samples as a table.

Only the main process writes. A run that is resumed cuts both JSONL files back to where its checkpoint left them, so
that they hold every step once. What metrics.jsonl then holds is given to the services again, which a kill may have
cost some of it: they end with the same numbers at the same steps.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from gem.checkpoint.folder import read_id
from gem.checkpoint.states import where_to_continue
from gem.config.settings import TrainConfig
from gem.data.answers import answers_match, decode
from gem.errors import UserError
from gem.parallel import processes
from gem.scoring.records import feature_rows, token_rows
from gem.scoring.score import ScoredRollout
from gem.terminal.text import visible

METRICS, COMPLETIONS = "metrics.jsonl", "completions.jsonl"


class Sink(Protocol):
    """A service beside metrics.jsonl."""

    def write(self, values: dict[str, float], step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


class JsonLines:
    """One JSON object a line, each written through as it comes; a number that is not finite is null.

    offset: bytes to keep of a file that is there.
    """

    def __init__(self, path: Path, offset: int | None = None) -> None:
        self.path = path
        with self._failures():
            if offset is not None:
                size = path.stat().st_size if path.exists() else 0
                if size < offset:
                    raise UserError(f"resume: {path} is shorter than the checkpoint says ({size} of {offset} bytes)")
                if size > offset:
                    _cut(path, offset)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            # Unbuffered: what could not be written would be tried again when the file is closed.
            self.file = os.fdopen(os.open(path, flags, 0o666), "ab", buffering=0)

    @property
    def offset(self) -> int:
        return self.file.tell()

    def write(self, row: dict[str, Any]) -> None:
        row = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        rest = memoryview((json.dumps(row, ensure_ascii=False) + "\n").encode())
        with self._failures():
            while rest:
                rest = rest[self.file.write(rest) :]

    def sync(self) -> None:
        """Onto the disk: a checkpoint must not know of lines that a power cut takes back."""
        with self._failures():
            os.fsync(self.file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            then = where_to_continue(self.path.parent)
            raise UserError(f"cannot write {self.path}: {error.strerror}; {then}") from error


def _cut(path: Path, size: int) -> None:
    """The file without what comes after `size` bytes: a new one under its name, so that no other name is cut too."""
    part = path.with_name(f".{path.name}.part")
    with path.open("rb") as file, part.open("wb") as kept:
        while left := size - kept.tell():
            kept.write(file.read(min(left, 1 << 20)))
        kept.flush()
        os.fsync(kept.fileno())
    part.replace(path)


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
        """offsets, step: of the checkpoint that the run continues from; step counts all optimizer steps of the run."""
        self.console = console
        self.files: dict[str, JsonLines] = {}
        self.sinks: list[Sink] = []
        if not processes.is_main():
            return
        for name in (METRICS, COMPLETIONS) if config.log_completions_steps else (METRICS,):
            self.files[name] = JsonLines(run_dir / name, None if offsets is None else offsets.get(name, 0))
        before = [] if offsets is None else read_metrics(run_dir / METRICS, step)
        for name in config.report_to:
            sink = _open_sink(name, config, run_dir, resumed=offsets is not None)
            self.sinks.append(sink)
            for row, total_steps in before:
                sink.write(numbers(row), total_steps)

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
        values = numbers(row)
        for sink in self.sinks:
            sink.write(values, total_steps)

    def samples(self, rows: Sequence[dict[str, Any]], num_generations: int, step: int) -> None:
        """All candidates of a step to completions.jsonl, and a table of the first two prompts' on the console."""
        if COMPLETIONS not in self.files:
            return
        for row in rows:
            self.files[COMPLETIONS].write(row)
        self.console.print(completion_table(rows[: 2 * num_generations], step))

    def close(self, failed: bool = False) -> None:
        """failed: the run ended with an error, which wandb shows. A second call does nothing."""
        for file in self.files.values():
            file.close()
        while self.sinks:
            with contextlib.suppress(Exception) if failed else contextlib.nullcontext():  # the run's own end is told
                self.sinks.pop().close(failed)


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """What a service gets of a row of metrics.jsonl, under its names there."""
    prefix = {"eval": "", "SFT": "sft/", "calibration": "calibration/"}.get(row["stage"], "train/")
    return {
        key if key.startswith("eval/") else prefix + key: float(value)
        for key, value in row.items()
        if isinstance(value, int | float) and key not in ("step", "total_steps")
    }


def read_metrics(path: Path, last_step: int) -> list[tuple[dict[str, Any], int]]:
    """The rows of metrics.jsonl, each with the optimizer steps of the run at that time, `last_step` at the end."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found, step = [], last_step
    for row in reversed(rows):
        found.append((row, step))
        step -= row["stage"] not in ("eval", "guard", "calibration")  # every other row is a step's
    return found[::-1]


def check_report_to(names: Sequence[str]) -> None:
    """Raises for the first service that is not installed, or that no one is logged in to."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"report_to: {name} is not installed: pip install {name}, or leave it out")
    if "wandb" in names:
        processes.on_main(_check_wandb)


def _check_wandb() -> None:
    import wandb

    try:
        if wandb.setup().settings.mode not in ("offline", "dryrun", "disabled"):
            wandb.login()
    except Exception as error:  # no key, no network, a key that the server does not know
        raise UserError(_cannot_begin("wandb", error)) from error


def completion_rows(
    scored: ScoredRollout,
    tokenizer: PreTrainedTokenizerBase,
    answers: Mapping[tuple[int, ...], str | None],
    *,
    stage: str,
    step: int,
    top_m: float | int,
) -> list[dict[str, Any]]:
    """A row for each candidate of a step, in the format of `gem.report.records`.

    answers: the known final answer of each prompt, by its token ids. The numbers of tokens are those that the sampler
    recorded: the step has no forward more for them.
    """
    rollout, scores = scored.rollout, scored.scores
    batch, size = rollout.batch, rollout.batch.num_generations
    prompt_ids = [tuple(ids[mask].tolist()) for ids, mask in zip(batch.prompt_ids, batch.prompt_mask)]
    prompts = decode(tokenizer, prompt_ids)
    features, tokens = feature_rows(scored), token_rows(scored, tokenizer, top_m)
    rows = []
    for i, completion in enumerate(rollout.texts):
        known, answer = answers.get(prompt_ids[i // size]), rollout.spans.answers[i]
        rows.append({
            "stage": stage,
            "step": step,
            "prompt_index": i // size,
            "candidate": i % size,
            "prompt": prompts[i // size],
            "completion": completion,
            "answer": answer,
            "correct": None if known is None else answers_match(answer, known),
            "score": float(scores.score[i]),
            "h_final": float(scores.final_entropy[i]),
            "h_fork": float(scores.fork_entropy[i]),
            "advantage": float(scored.advantages[i]),
            "valid": bool(scores.valid[i]),
            "truncated": bool(rollout.truncated[i]),
            "features": features[i],
            **tokens[i],
        })  # fmt: skip
    return rows


def completion_table(rows: Sequence[dict[str, Any]], step: int) -> Table:
    table = Table(title=f"Samples, step {step}", title_justify="left")
    table.add_column("prompt", ratio=2)
    table.add_column("completion", ratio=3)
    for name in ("score", "advantage"):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in rows:
        prompt = Text("") if row["prompt"] == last else _short(row["prompt"])
        last = row["prompt"]
        table.add_row(prompt, _short(row["completion"]), f"{row['score']:.3f}", f"{row['advantage']:+.3f}")
    return table


def _short(text: str, most: int = 160) -> Text:
    """One line of what a model or a user wrote: no markup of rich's, nothing that drives the terminal."""
    words = " ".join(text.split())
    return Text(visible(words if len(words) <= most else words[: most // 2] + " … " + words[-most // 2 :]))


class _TensorBoard:
    def __init__(self, config: TrainConfig, run_dir: Path, resumed: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if resumed:  # its files may lack the last two minutes before a kill, and hold steps that come again
            shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
        self.writer = SummaryWriter(str(run_dir / "tensorboard"))
        self._hook, threading.excepthook = threading.excepthook, self._on_thread

    def _on_thread(self, failure: Any) -> None:
        """A full disk ends the writer's thread, and is raised by the next `write`: its trace would be a second one."""
        if not (isinstance(failure.exc_value, OSError) and "AsyncWriter" in type(failure.thread).__name__):
            self._hook(failure)

    def write(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self, failed: bool) -> None:
        try:
            self.writer.close()
        finally:
            threading.excepthook = self._hook


class _Trackio:
    """A run named as its directory in the project "gem". One that is resumed takes the place of what it was: what a
    kill left of it may lack the last half second, and hold steps that come again."""

    def __init__(self, config: TrainConfig, run_dir: Path, resumed: bool) -> None:
        import trackio

        place = run_dir / "trackio_id"
        if resumed and (before := read_id(place)):
            with contextlib.suppress(ValueError):  # there is no such project on this machine
                for run in trackio.Api().runs("gem"):
                    if run.id == before:
                        run.delete()
        # The run itself, not the module's functions: those belong to the run that the process has opened last.
        self.run = trackio.init(project="gem", name=run_dir.name, config=config.model_dump())
        place.write_text(self.run.id)

    def write(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish()


class _Wandb:
    """A run in the project "gem". One that is resumed goes on under its id, behind the last step that the server has;
    offline, where a kill may take back 15 seconds, it takes the place of what was not synced."""

    def __init__(self, config: TrainConfig, run_dir: Path, resumed: bool) -> None:
        import wandb

        name, place = uuid.uuid4().hex[:16], run_dir / "wandb_id"
        if resumed and (before := read_id(place)):
            old = list((run_dir / "wandb").glob(f"offline-run-*-{before}"))
            if not any(list(path.glob("*.synced")) for path in old):  # else a second sync would repeat its steps
                name = before
                for path in old:
                    shutil.rmtree(path)
        place.write_text(name)
        self.run = wandb.init(
            project="gem",
            name=run_dir.name,
            config=config.model_dump(),
            dir=str(run_dir),
            id=name,
            resume="allow" if resumed else "never",
            reinit="create_new",  # beside any other run that the process has open
            settings=wandb.Settings(quiet=True),
        )
        self.first_step = self.run.step  # not 0 where the server has some

    def write(self, values: dict[str, float], step: int) -> None:
        if step >= self.first_step:
            self.run.log(values, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def _open_sink(name: str, config: TrainConfig, run_dir: Path, resumed: bool) -> Sink:
    kind = {"tensorboard": _TensorBoard, "trackio": _Trackio, "wandb": _Wandb}[name]
    try:
        return kind(config, run_dir, resumed)
    except UserError:
        raise
    except Exception as error:  # no account, no server, a full disk: services fail in ways of their own
        raise UserError(_cannot_begin(name, error)) from error


def _cannot_begin(name: str, error: Exception) -> str:
    why = " ".join(str(error).split())[:300]
    return f"report_to: {name} cannot begin: {why}; set it up, or leave it out"
