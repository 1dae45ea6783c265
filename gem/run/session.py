"""What a run needs before its first step, checked in the order in which mistakes are cheap to find."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch import nn

from gem.calibration.score_file import Score, read_score, write_score
from gem.config.read import load_config, save_config
from gem.config.settings import TrainConfig
from gem.data.batches import TokenizedPair
from gem.data.pairs import load_prompts, load_run_pairs
from gem.data.prompts import TextFormat
from gem.data.sources import check_source
from gem.errors import UserError
from gem.evaluation.evaluate import Evaluation
from gem.model.forward import Policy
from gem.model.load import (
    context_length,
    end_token_ids,
    load_model_for_training,
)
from gem.model.opened import open_text
from gem.model.source import find_model
from gem.parallel import processes
from gem.rollout.sample import Sampler
from gem.rollout.vllm import check_vllm, make_sampler
from gem.run import checkpoint
from gem.run.tracking import Tracker, check_report_to
from gem_kernels import LinearScore

# What a resumed run may have other than the run it continues: nothing that its numbers depend on.
MAY_CHANGE = ("save_steps", "save_total_limit", "report_to", "max_bad_steps", "vllm_server_url")


@dataclass(frozen=True)
class Session:
    """What every stage of a run needs: the policy, its tokens, the data as tokens, and where things go."""

    config: TrainConfig
    accelerator: Accelerator
    policy: Policy
    form: TextFormat
    train_pairs: list[TokenizedPair]
    eval_pairs: list[TokenizedPair]
    prompts: list[TokenizedPair]  # those that candidates are sampled for; their answers are not looked at
    run_dir: Path
    tracker: Tracker
    console: Console
    sampler: Sampler | None  # vLLM; None: the model itself
    linear: LinearScore | None = None  # the score of the file that `score` names


@dataclass
class RunState:
    """How far a run is. With the weights and the generators' states, all that the rest of it depends on."""

    stage: str = "start"
    step: int = 0  # optimizer steps of the stage, skipped ones included
    total_steps: int = 0  # of the run
    evaluations: dict[str, Evaluation] = field(default_factory=dict)  # by stage that is over
    best: str | None = None  # directory of the best weights so far, for the guards
    best_accuracy: float = -1.0
    stage_state: dict[str, Any] | None = None  # of the stage in which the run is resumed, until it has begun


def prepare(config: TrainConfig, accelerator: Accelerator, console: Console, resume: bool) -> tuple[Session, RunState]:
    """Checks paths, services, data and lengths, loads the model, and makes or reopens the run's directory."""
    run_dir = check_resume(config) if resume else checkpoint.check_run_directory(config.output_dir)
    check_report_to(config.report_to)
    given = given_score(config)
    for source in filter(None, (config.train_file, config.eval_file, config.prompts_file)):
        check_source(source)
    processes.wait_for_all()  # every process has seen the directory as it was before one makes it
    source = find_model(config.model)
    check_vllm(config, source)
    console.print(f"Loading {source.gguf_file or source.name}", highlight=False)
    form, model_config = open_text(source, config)
    train_pairs, eval_pairs, reports = load_run_pairs(config, form, context_length(model_config))
    prompts = train_pairs
    if config.prompts_file is not None:
        prompts, report = load_prompts(config, form, context_length(model_config))
        reports.append(report)
    for report in filter(str, reports):
        console.print(str(report), highlight=False)
    check_calibration(config, train_pairs)
    set_seed(config.seed)  # a new adapter's weights are drawn when the model is loaded
    whole = load_model_for_training(source, model_config, config)
    form = dataclasses.replace(form, end_tokens=end_token_ids(whole, form.tokenizer, form.end_of_turn))
    model = processes.prepare_model(whole, accelerator, config.max_grad_norm)
    set_seed(config.seed + processes.rank())
    linear = None if given is None else LinearScore(given.weights, given.scales)
    if resume:
        state, offsets = restore(run_dir, model, fingerprint(train_pairs, eval_pairs, prompts), repr(linear), console)
    else:
        state, offsets = RunState(), None
        processes.on_main(lambda: start_run_directory(config, run_dir, given))
    tracker = Tracker(config, run_dir, console, offsets=offsets, step=state.total_steps)
    return Session(
        config=config,
        accelerator=accelerator,
        policy=Policy(model, config.padding_free),
        form=form,
        train_pairs=train_pairs,
        eval_pairs=eval_pairs,
        prompts=prompts,
        run_dir=run_dir,
        tracker=tracker,
        console=console,
        sampler=make_sampler(config, source, run_dir),
        linear=linear,
    ), state


def start_run_directory(config: TrainConfig, run_dir: Path, given: Score | None) -> None:
    checkpoint.make_run_directory(run_dir)
    save_config(config, run_dir / "config.yaml")
    if given is not None:
        write_score(given, run_dir / "score.json")


def given_score(config: TrainConfig) -> Score | None:
    """The score of the file that `score` names; None: the paper's, or one that is fitted in the run."""
    if config.score in ("paper", "calibrated"):
        return None
    try:
        score = read_score(config.score)
    except UserError as error:
        raise UserError(f"score: expected paper, calibrated or a score.json of gem calibrate; {error}") from error
    if score.top_m != config.top_m:
        raise UserError(
            f"score: {config.score} was fitted with top_m: {score.top_m}, this run has {config.top_m}; "
            f"set top_m: {score.top_m}"
        )
    return score


def check_calibration(config: TrainConfig, pairs: Sequence[TokenizedPair]) -> None:
    number = len({pair.prompt_ids for pair in pairs})
    if config.uses_score and config.score == "calibrated" and number < 2:
        raise UserError(
            f"score: calibrated needs pairs of at least 2 prompts to train on, got {number}; add pairs, or set "
            "score: paper"
        )


def check_resume(config: TrainConfig) -> Path:
    """The run's directory, if a run of this configuration can be continued in it. Changes nothing."""
    run_dir = Path(config.output_dir).expanduser()
    saved = run_dir / "config.yaml"
    if not saved.is_file():
        raise UserError(f"resume: there is no run in {run_dir}; start it without --resume")
    if (run_dir / "model").is_dir():
        raise UserError(f"resume: the run in {run_dir} is complete; its model is {run_dir / 'model'}")
    before = load_config(saved).model_dump()
    changed = [k for k, v in config.model_dump().items() if v != before[k] and k not in MAY_CHANGE]
    if changed:
        raise UserError(
            f"resume: {', '.join(changed)} changed since the run began (it had {changed[0]}: {before[changed[0]]!r}); "
            f"only {', '.join(MAY_CHANGE)} may"
        )
    if not checkpoint.checkpoints(run_dir):
        raise UserError(
            f"resume: {run_dir} holds no checkpoint (save_steps: {before['save_steps']}); "
            "remove it and start the run without --resume"
        )
    return run_dir


def restore(
    run_dir: Path, model: nn.Module, data: str, score: str, console: Console
) -> tuple[RunState, dict[str, int]]:
    """The newest checkpoint into the model and the generators; (where the run is, offsets of its files)."""
    path = checkpoint.checkpoints(run_dir)[-1]
    parameters, saved = checkpoint.load_checkpoint(path)
    if saved["data"] != data:
        raise UserError("resume: train_file or eval_file no longer holds the pairs that the run began with")
    if saved.get("score", score) != score:
        raise UserError("resume: the file that score names no longer holds the score that the run began with")
    if len(saved["random"]) != processes.world_size():
        raise UserError(
            f"resume: the run has {len(saved['random'])} processes, this is {processes.world_size()}; "
            "launch as many as before"
        )
    processes.on_main(lambda: checkpoint.remove_leftovers(run_dir))
    checkpoint.restore_parameters(model, parameters)
    processes.restore_random_state(saved["random"][processes.rank()])
    state = checkpoint.from_tree(RunState, saved["progress"])
    state.stage_state = saved["stage_state"]
    console.print(f"Continuing from {path.name}: {state.stage}, step {state.step}", highlight=False)
    return state, saved["offsets"]


def save(session: Session, state: RunState, stage_state: dict[str, Any]) -> None:
    """A checkpoint of all of it, by all processes together."""
    tree = {
        "version": 1,
        "progress": checkpoint.to_tree(dataclasses.replace(state, stage_state=None)),
        "stage_state": stage_state,
        "data": fingerprint(session.train_pairs, session.eval_pairs, session.prompts),
        "score": repr(session.linear),
        "random": processes.gather([processes.random_state()]),
        "offsets": session.tracker.offsets,
    }
    parameters = checkpoint.trained_parameters(session.policy.model)
    keep = session.config.save_total_limit

    def write() -> None:
        checkpoint.save_checkpoint(session.run_dir, state.total_steps, parameters, tree, keep)
        checkpoint.remove_others(session.run_dir, "best-*", state.best)

    processes.on_main(write)


def fingerprint(*parts: Sequence[TokenizedPair]) -> str:
    """A hash of the data as tokens: what the model sees of it."""
    digest = hashlib.blake2b(digest_size=16)
    for pairs in parts:
        digest.update(repr(pairs).encode())
    return digest.hexdigest()
