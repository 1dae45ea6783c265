"""The loop: each stage's steps, evaluated before and after; a model directory comes out."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from gem.checkpoint import states
from gem.checkpoint.folder import continue_command
from gem.config.settings import TrainConfig
from gem.errors import Interrupted, UserError
from gem.evaluation.evaluate import CandidateSettings, Evaluation, evaluate
from gem.evaluation.report import evaluation_metrics, evaluation_table
from gem.interrupt import Interrupt
from gem.parallel import processes
from gem.progress import progress
from gem.report.page import write_report
from gem.run.calibration import gate_is_open, measure_score, with_score
from gem.run.guards import Guards, watch
from gem.run.keep_best import forget_weights, keep_better, keep_weights
from gem.run.metrics import step_metrics
from gem.run.save_points import SavePoints
from gem.run.session import RunState, Session, prepare
from gem.run.stages import Stage, planned_stages
from gem.run.tracking import completion_rows
from gem.scoring.score import ScoredRollout
from gem.terminal.console import make_console, print_result, print_warning
from gem_kernels import LinearScore

# What a disk or its permissions say; other failures of the system are not the run's to explain.
DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENAMETOOLONG, errno.ENOTDIR),
}


@dataclass(frozen=True)
class TrainResult:
    run_dir: Path
    model_dir: Path
    evaluations: dict[str, Evaluation]  # by stage: "start", then those that were run ("SFT", "SEGA", ...)
    seconds: dict[str, float]  # wall time of each phase
    page: Path | None = None  # the run to look at; None: it could not be written, or another process writes it
    saved: str = ""  # the stage whose weights `model_dir` holds


def train(config: TrainConfig, console: Console | None = None, *, resume: bool = False) -> TrainResult:
    """One run from the configuration to a saved model, or, with `resume`, the rest of the run in `output_dir`.

    User mistakes are raised before anything is written.
    """
    clock = Clock()
    accelerator = processes.make_accelerator(config.device)
    console = (console or make_console()) if processes.is_main() else Console(quiet=True)
    with places_named(Path(config.output_dir).expanduser()):
        session, state = prepare(config, accelerator, console, resume)
        clock.lap("loading")
        try:
            with Interrupt() as interrupt:
                model_dir, saved = run_stages(session, state, clock, SavePoints(session, state, interrupt))
            session.tracker.close()
        finally:
            session.tracker.close(failed=True)  # does nothing the second time
            session.folder.close()
    processes.wait_for_all()
    page = write_page(session.run_dir, console) if processes.is_main() else None
    return TrainResult(session.run_dir, model_dir, state.evaluations, clock.seconds, page, saved)


@contextmanager
def places_named(run_dir: Path) -> Iterator[None]:
    """A disk that fails, or is full, is one UserError; that and a signal's end name the last good checkpoint."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = error.filename or run_dir
        raise UserError(f"cannot use {where}: {error.strerror}; {states.where_to_continue(run_dir)}") from error
    except Interrupted as ended:
        kept = states.checkpoints(run_dir)
        if "--resume" in str(ended) or not (run_dir / "config.yaml").is_file():
            raise
        words = "there is no checkpoint"
        if kept:
            words = f"the last good checkpoint is {kept[-1].name}; continue: {continue_command(run_dir)}"
        raise Interrupted(ended.number, f" at once; {words}") from None


def run_stages(session: Session, state: RunState, clock: Clock, points: SavePoints) -> tuple[Path, str]:
    """All that is left of a run; the directory of the model that comes out, and the stage that it is the model of."""
    if "start" not in state.evaluations:
        state.evaluations["start"] = run_evaluation(session, state, "start")
        clock.lap("evaluation")
    saved = ""
    for kind in planned_stages(session.config):
        if kind.name not in state.evaluations:
            points.after_evaluation()
            stage = kind(session)
            if not run_stage(stage, session, state, points):
                break
            clock.lap(stage.name)
            before = list(state.evaluations)[-1]
            state.evaluations[stage.name] = run_evaluation(session, state, stage.name, stage.linear)
            clock.lap("evaluation")
            if stage.is_objective and session.config.keep_best:
                saved = keep_better(session, state, before, stage.name)
    saved = saved or list(state.evaluations)[-1]
    model_dir = session.run_dir / "model"
    model, tokenizer = session.policy.model, session.form.tokenizer
    weights = processes.whole_state_dict(model)
    processes.on_main(lambda: states.save_model(model, tokenizer, model_dir, weights))
    forget_weights(session)
    clock.lap("saving")
    return model_dir, saved


def run_stage(stage: Stage, session: Session, state: RunState, points: SavePoints) -> bool:
    """All steps of a stage, or those that are left of it where the run is resumed within it.

    False: the objective was not begun, because its score did not pass the gate.
    """
    config, guards = session.config, Guards(session.config)
    if state.stage_state is not None and state.stage_state["name"] == stage.name:
        with states.fitting("the checkpoint"):
            stage.load_state_dict(state.stage_state)
            guards.load_state_dict(state.stage_state["guards"])
    else:
        state.stage, state.step = stage.name, 0
        if stage.is_objective and not gate_is_open(stage, state, measure_score(stage, state)):
            return False
        stage.begin()
        if stage.is_objective:
            if config.keep_best:
                keep_weights(session)
            watch(guards, stage, state, {}, list(state.evaluations.values())[-1])
    state.stage_state = None
    with progress(session.console, stage.name, stage.num_steps) as bar:
        bar.advance(state.step)
        while state.step < stage.num_steps:
            start = time.monotonic()
            result = stage.take_step(state.step)
            state.step += 1
            state.total_steps += 1
            row = {"stage": stage.name, "step": state.step, **step_metrics(result)}
            row["step_time"] = time.monotonic() - start
            session.tracker.write(row, state.total_steps)
            if stage.trainer.bad_steps >= config.max_bad_steps:
                raise UserError(
                    f"{stage.name}, step {state.step}: the loss or gradient was not finite {stage.trainer.bad_steps} "
                    "times in a row; lower learning_rate, or set dtype: float32"
                )
            if result.scored is not None and not stage.samples_once:
                stage.check_candidates(result.scored, state.step)
            every = 1 if stage.samples_once else config.log_completions_steps
            if result.scored is not None and config.log_completions_steps and is_due(every, state.step):
                write_samples(session, stage, state.step, result.scored)
            if stage.is_objective:
                evaluation = None
                if state.step < stage.num_steps and is_due(config.eval_steps, state.step):
                    evaluation = run_evaluation(session, state, f"{stage.name} {state.step}", stage.linear)
                # Candidates that were sampled once are those of the policy before the stage.
                watch(guards, stage, state, {} if stage.samples_once else row, evaluation)
                if state.step < stage.num_steps and is_due(config.recalibrate_steps, state.step):
                    recalibrate(stage, state, guards)
            points.after_step(stage, guards)
            bar.note(result.note)
            bar.advance()
    stage.finish()
    return True


def write_samples(session: Session, stage: Stage, step: int, scored: ScoredRollout) -> None:
    """The candidates of a step to completions.jsonl and as a table."""
    if not processes.is_main():
        return
    answers = {pair.prompt_ids: pair.answer for pair in (*session.train_pairs, *session.prompts)}
    rows = completion_rows(
        scored, session.form.tokenizer, answers, stage=stage.name, step=step, top_m=session.config.top_m
    )
    session.tracker.samples(rows, scored.rollout.batch.num_generations, step)


def recalibrate(stage: Stage, state: RunState, guards: Guards) -> None:
    """Fits the score again to the policy as it is now; the stage ends where it does not pass the gate."""
    row = measure_score(stage, state)
    if not gate_is_open(stage, state, row):
        state.step = stage.num_steps
    else:
        watch(guards, stage, state, row or {}, None)


def run_evaluation(session: Session, state: RunState, name: str, linear: LinearScore | None = None) -> Evaluation:
    """Evaluates the model as it is, on the same prompts and seed every time, and writes what came to the metrics.

    At the start without answers where `eval_on_start` is false: the pairs' log-probs are the reference of later ones.
    linear: the score of the candidates in place of the one that the run was given.
    """
    linear = linear or session.linear
    config, start = session.config, state.evaluations.get("start")
    silent = name == "start" and not config.eval_on_start
    result = evaluate(
        session.policy,
        session.form,
        session.eval_pairs,
        settings=config.changed(eval_generate=0, eval_sample=0) if silent else config,
        how=CandidateSettings(config, config, linear),
        console=session.console,
        name=name,
        reference=None if start is None else start.logprobs,
    )
    result = with_score(result, session, linear)
    session.tracker.write({"stage": "eval", "after": name, **evaluation_metrics(result)}, state.total_steps)
    return result


def is_due(every: int, step: int) -> bool:
    """True at every `every`-th step; 0: never."""
    return every > 0 and step % every == 0


class Clock:
    """Wall time by phase, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.monotonic()

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


def report(result: TrainResult, console: Console) -> None:
    """The table of evaluations, where the time went, and where the run and its page are."""
    print_result(console, evaluation_table(result.evaluations))
    report_run(result, console)


def report_run(result: TrainResult, console: Console) -> None:
    """Where the time went, and where the run and its page are."""
    times = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in result.seconds.items())
    console.print(f"Time: {times}", highlight=False)
    which = f" of {result.saved}" if result.saved not in ("", list(result.evaluations)[-1]) else ""
    print_result(console, f"Run: {result.run_dir} (model/{which}, metrics.jsonl, config.yaml)")
    if result.page is not None:
        print_result(console, f"Page: {result.page}")


def write_page(run_dir: Path, console: Console) -> Path | None:
    """The run as a page, `report.html` in its folder. A page that cannot be made costs a line, never the run."""
    page = run_dir / "report.html"
    try:
        write_report(run_dir, page)
    except Exception as error:  # whatever it is, the model is saved
        why = " ".join(str(error).split()) or type(error).__name__
        print_warning(console, f"Page: not written: {why}")
        return None
    return page
