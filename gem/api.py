"""The method from Python: `gem.train`, `gem.score`, `gem.generate`, `gem.evaluate`, `gem.calibrate`.

Each does what the command of its name does, with the same checks: what is wrong is one `gem.UserError`. A model is a
name (a directory, a GGUF file, a hub id) or (model, tokenizer) of transformers; rows are a list of dictionaries, a
datasets.Dataset, or what the commands take (a path, a hub id). The random state of torch, numpy and Python is
afterwards what it was before, and so is the mode, training or not, of a model that was given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from gem import loop
from gem.calibration.score_file import Score
from gem.checkpoint.folder import check_run_directory
from gem.config.read import build_config
from gem.config.settings import RowSettings, TextSettings
from gem.config.use import CalibrateSettings, EvaluateSettings, GenerateSettings, ScoreSettings
from gem.data.pairs import answers_from_row
from gem.data.sources import GivenRows, Row, Source
from gem.errors import UserError, path_of
from gem.evaluation.evaluate import Evaluation
from gem.files import remove_directory, write_directory
from gem.loop import TrainResult
from gem.model.load import save_pretrained
from gem.model.opened import ModelLike, OpenedModel, model_name, open_model
from gem.parallel import processes
from gem.terminal.console import make_console
from gem.use import evaluate as evaluating
from gem.use import generate as generating
from gem.use.calibrate import calibrate_data
from gem.use.score import score_data

# A path, the id of a dataset, or the rows themselves.
RowsLike = str | Path | Iterable[Mapping[str, Any]]


def train(
    model: ModelLike,
    pairs: RowsLike,
    *,
    output_dir: str | Path,
    held_out: RowsLike | None = None,
    resume: bool = False,
    verbose: bool = True,
    **settings: Any,
) -> TrainResult:
    """`gem train`: SFT, then the objective, evaluated before and after; a directory with the model comes out.

    What is in memory is first written beside `output_dir`, so that the run can be continued and repeated from its
    config.yaml: pairs to OUTPUT_DIR.pairs.jsonl, held_out to OUTPUT_DIR.held_out.jsonl, a model to OUTPUT_DIR.start/.
    The model given is not changed.

    Args:
        model: a name, or (model, tokenizer).
        pairs: rows with "prompt", "chosen", "rejected" and, where it is known, "answer".
        output_dir: the run's directory, new or empty (or, with resume, the run's).
        held_out: the pairs to evaluate on; None: `eval_fraction` of the prompts of `pairs`.
        resume: continue the run in output_dir.
        verbose: print progress and tables to standard output. Warnings come as Python's where it is off: that the
            gate stopped the objective, say, or that keep_best went back.
        settings: any setting of `gem config`: preset="safe", max_steps=20, ...

    Returns:
        TrainResult: run_dir, model_dir, evaluations by stage, `saved` (the stage whose weights model_dir holds),
            seconds by phase, and the run's page.

    Raises:
        UserError: a setting, a row or a path that cannot be used; nothing is left behind.
        Interrupted (gem.errors): Ctrl-C or another signal, once a checkpoint is saved; a second one at once.

    Example:
        pairs = [{"prompt": "2 + 2?", "chosen": "Final Answer: 4", "rejected": "Final Answer: 5", "answer": "4"}, ...]
        result = gem.train("HuggingFaceTB/SmolLM2-135M-Instruct", pairs, output_dir="runs/first", preset="safe")
        print(result.evaluations[result.saved].preference.accuracy, result.model_dir)
    """
    for key, instead in (("train_file", "pairs"), ("eval_file", "held_out")):
        if key in settings:
            raise UserError(f"{key}: give it as {instead}")
    root = path_of(output_dir, "output_dir")
    beside = {name: root.with_name(f"{root.name}.{name}") for name in ("pairs.jsonl", "held_out.jsonl", "start")}
    values: dict[str, Any] = {"train_file": _given(pairs, "pairs"), "eval_file": None}
    if held_out is not None:
        values["eval_file"] = _given(held_out, "held_out")
    files = {key: beside[name] for key, name in (("train_file", "pairs.jsonl"), ("eval_file", "held_out.jsonl"))}
    texts = {files[k]: _json_lines(v) for k, v in values.items() if isinstance(v, GivenRows)}
    paths = {k: str(files[k]) if isinstance(v, GivenRows) else v and str(v) for k, v in values.items()}
    given = isinstance(model, tuple | list)
    opened = open_model(model, TextSettings()) if given else None
    name = str(beside["start"]) if given else model_name(model)
    config = build_config({**settings, **paths, "model": name, "output_dir": str(output_dir)})
    if not resume:
        check_run_directory(root)
    with _as_it_was(model):
        made: list[Path] = []
        try:
            made += [path for path, text in texts.items() if _write_beside(path, text)]
            if opened is not None and _save_beside(beside["start"], opened, resume):
                made.append(beside["start"])
            console = make_console(python_warnings=not verbose)
            result = loop.train(config, console, resume=resume)
        except BaseException:
            if not root.exists():  # no run has begun that would need them
                for path in made:
                    remove_directory(path) if path.is_dir() else path.unlink(missing_ok=True)
            raise
    if verbose and processes.is_main():
        loop.report(result, console)
    return result


def score(
    model: ModelLike,
    data: RowsLike,
    *,
    score: Score | str | Path | None = None,
    verbose: bool = False,
    **settings: Any,
) -> list[dict[str, Any]]:
    """`gem score`: a row for each answer, given or sampled, as the command writes it (`gem.report.records`).

    Args:
        model: a name, or (model, tokenizer).
        data: rows with "prompt" and "completion", or "chosen" and "rejected"; where answers are sampled "prompt" alone.
        score: a score.json of `gem calibrate`, or its content; None: the paper's S = -H_final + fork_weight * H_fork.
        verbose: print progress to standard error. Warnings come as Python's where it is off.
        settings: of `gem.config.use.ScoreSettings`. num_generations=8 samples so many candidates of a prompt;
            best=True leaves of them the one of the highest score; tokens=True gives each token's entropy and log-prob;
            max_completion_length, temperature, seed, system_prompt, answer_span, batch_size, device, ...

    Raises:
        UserError: a setting, a row, a score.json or a model that cannot be used.

    Example:
        rows = gem.score("runs/first/model", [{"prompt": "2 + 2?"}], num_generations=8, best=True, score="score.json")
        print(rows[0]["final_answer"], rows[0]["score"], rows[0].get("probability"), rows[0]["agreement"])
    """
    checked = ScoreSettings(**settings)
    with _as_it_was(model):
        return list(score_data(model, _given(data, "data"), checked, score, _console(verbose)))


def generate(
    model: ModelLike,
    prompt: str | Sequence[Mapping[str, str]],
    *,
    score: Score | str | Path | None = None,
    verbose: bool = False,
    **settings: Any,
) -> list[dict[str, Any]]:
    """`gem generate`: answers of one prompt, the highest score first, as rows of `gem.score`.

    Args:
        model: a name, or (model, tokenizer).
        prompt: a question, or the messages of a chat, [{"role": "user", "content": ...}, ...].
        score, verbose: as of `gem.score`.
        settings: of `gem.config.use.GenerateSettings`. num_generations=1 is the most likely answer; more are sampled at
            temperature 1. best=True, tokens=True, max_completion_length, temperature, seed, system_prompt, ...

    Raises:
        UserError: as `gem.score`; a prompt that is empty or does not fit the model's context.

    Example:
        (row,) = gem.generate((model, tokenizer), "2 + 2?", num_generations=8, best=True)
        print(row["completion"])
    """
    checked = GenerateSettings(**settings)
    is_chat = isinstance(prompt, list | tuple) and all(isinstance(message, Mapping) for message in prompt)
    if not isinstance(prompt, str) and not is_chat:
        raise UserError(
            "prompt: expected one question as text, or the messages of one chat, [{'role': 'user', 'content': ...}], "
            f"got {_type(prompt)}; several prompts are rows of gem.score: [{{'prompt': ...}}, ...]"
        )
    messages = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    parsed = answers_from_row(Row("prompt", {"prompt": messages}), (), RowSettings())
    if isinstance(parsed, str):
        raise UserError(f"prompt: {parsed}")
    with _as_it_was(model):
        return generating.generate(model, parsed[0], checked, score, _console(verbose))


def evaluate(
    model: ModelLike,
    pairs: RowsLike,
    *,
    reference: ModelLike | None = None,
    verbose: bool = False,
    **settings: Any,
) -> Evaluation:
    """`gem evaluate`: preference accuracy on pairs and its calibration; answer accuracy and scores on request.

    Args:
        model: a name, or (model, tokenizer).
        pairs: rows with "prompt", "chosen", "rejected" and, where it is known, "answer".
        reference: the model that preference_reduction="relative" compares with.
        verbose: as of `gem.score`.
        settings: of `gem.config.use.EvaluateSettings`. eval_generate=100 answers so many problems greedily,
            eval_sample=16 samples num_generations candidates of so many prompts; dpo_beta, preference_reduction, ...

    Returns:
        Evaluation: preference, calibration, answers, candidates, sampled; each with 95 % intervals.

    Raises:
        UserError: a setting, a row or a model that cannot be used.

    Example:
        result = gem.evaluate("runs/first/model", "held_out.jsonl", eval_generate=100)
        print(result.preference.accuracy, result.preference.low, result.preference.high)
    """
    checked = EvaluateSettings(**settings)
    if checked.preference_reduction == "relative" and reference is None:
        raise UserError(
            'reference: expected the model to compare with, as preference_reduction is "relative", got none'
        )
    with _as_it_was(model, reference):
        return evaluating.evaluate_data(model, _given(pairs, "pairs"), checked, reference, _console(verbose))


def calibrate(
    model: ModelLike,
    pairs: RowsLike,
    *,
    held_out: RowsLike | None = None,
    verbose: bool = False,
    **settings: Any,
) -> Score:
    """`gem calibrate`: a score fitted to pairs, tested, with a verdict on whether to trust it (docs/calibration.md).

    Args:
        model: a name, or (model, tokenizer).
        pairs: rows with "prompt", "chosen", "rejected" and, where it is known, "answer".
        held_out: rows of other prompts with known answers, on whose samples the score is tested.
        verbose: as of `gem.score`.
        settings: of `gem.config.use.CalibrateSettings`: score_features, num_generations (0: no samples), temperature,
            max_completion_length, seed, ...

    Returns:
        Score: for `gem.score(score=...)`; `gem.calibration.score_file.write_score` writes it as a score.json.

    Raises:
        UserError: a setting, a row or a model that cannot be used.

    Example:
        score = gem.calibrate("runs/sft/model", pairs)
        print(score.verdict.words)
        rows = gem.score("runs/sft/model", problems, num_generations=8, best=True, score=score)
    """
    checked = CalibrateSettings(**settings)
    if held_out is not None and not checked.num_generations:
        raise UserError(
            "held_out: expected num_generations of at least 1 with it, got 0: the score is tested on samples"
        )
    if checked.calibrate_on == "candidates" and checked.num_generations < 2:
        raise UserError(
            f"calibrate_on: candidates: expected num_generations of at least 2 with it, got {checked.num_generations}: "
            "a right and a wrong answer are told apart"
        )
    others = None if held_out is None else _given(held_out, "held_out")
    with _as_it_was(model):
        return calibrate_data(model, _given(pairs, "pairs"), checked, others, _console(verbose))


@contextmanager
def _as_it_was(*models: ModelLike | None) -> Iterator[None]:
    """Puts back the global random state, and the mode of each module of the models given."""
    state = processes.random_state()
    networks = [part for model in models if isinstance(model, tuple | list) for part in model]
    modes = [(m, m.training) for part in networks if isinstance(part, nn.Module) for m in part.modules()]
    try:
        yield
    finally:
        processes.restore_random_state(state)
        for module, training in modes:
            module.training = training


def _console(verbose: bool) -> Console:
    return make_console(stderr=True, python_warnings=not verbose)


def _given(rows: RowsLike, name: str) -> Source:
    """A path or a dataset's id as it is; rows under a name for messages."""
    if isinstance(rows, str | Path):
        return rows
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        hint = "; give one split of it" if isinstance(rows, Mapping) else ""
        raise UserError(f"{name}: expected rows (a list of dictionaries, a Dataset) or a path, got {_type(rows)}{hint}")
    found = list(rows)
    for i, row in enumerate(found):
        if not isinstance(row, Mapping):
            raise UserError(f"{name} row {i}: expected a dictionary, got {_type(row)}")
    return GivenRows(name, [dict(row) for row in found])


def _json_lines(given: GivenRows) -> str:
    lines = []
    for i, row in enumerate(given.rows):
        try:
            lines.append(json.dumps(row) + "\n")
        except (TypeError, ValueError) as error:
            raise UserError(f"{given} row {i}: not text and numbers: {error}") from error
    return "".join(lines)


def _write_beside(path: Path, text: str) -> bool:
    """Whole, or not at all; False where the same is there already."""
    try:
        if path.exists():
            if path.read_text(encoding="utf-8") == text:
                return False
            raise UserError(f"output_dir: {path} exists and holds other rows; remove it, or give another output_dir")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise UserError(f"output_dir: cannot write {path}: {error.strerror}") from error
    return True


def _save_beside(path: Path, opened: OpenedModel, resume: bool) -> bool:
    """The model as a directory; False where a run that goes on has it there."""
    if path.exists():
        if resume:
            return False
        raise UserError(f"output_dir: {path} exists; remove it, or give another output_dir")
    path.parent.mkdir(parents=True, exist_ok=True)

    def fill(part: Path) -> None:
        save_pretrained(opened.model, opened.form.tokenizer, part)

    write_directory(path, fill, f"cannot save {path}")
    return True


def _type(value: Any) -> str:
    return type(value).__name__
