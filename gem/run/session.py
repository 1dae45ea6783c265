"""What a run needs before its first step, checked in the order in which mistakes are cheap to find."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch import nn
from transformers import PreTrainedConfig

from gem.calibration.score_file import Score, read_score, write_score
from gem.checkpoint import states
from gem.checkpoint.folder import RunFolder, begin_again, check_run_directory, continue_command, refuse_links
from gem.checkpoint.tree import from_tree, to_tree
from gem.config.read import config_text, load_config
from gem.config.settings import TrainConfig
from gem.data.batches import TokenizedPair
from gem.data.pairs import load_prompts, load_run_pairs
from gem.data.prompts import TextFormat
from gem.data.sources import check_source
from gem.errors import UserError
from gem.evaluation.evaluate import Evaluation
from gem.files import remove_directory, write_lines
from gem.model.forward import Policy
from gem.model.load import (
    context_length,
    end_token_ids,
    load_model_for_training,
)
from gem.model.opened import open_text
from gem.model.source import ModelSource, find_model
from gem.parallel import processes
from gem.rollout.sample import Sampler
from gem.rollout.vllm import check_vllm, make_sampler
from gem.run.tracking import Tracker, check_report_to
from gem.terminal.console import print_warning
from gem_kernels import LinearScore

# What a resumed run may have other than the run it continues: nothing that its numbers depend on,
MAY_CHANGE = (
    *("save_minutes", "save_steps", "save_total_limit", "report_to"),
    *("max_bad_steps", "max_empty_steps", "vllm_server_url"),
)
# and where things are: a folder may have been moved. A checkpoint knows the data by what is in it.
MAY_MOVE = ("output_dir", "train_file", "eval_file", "prompts_file")


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
    data: str  # fingerprint of the three
    folder: RunFolder
    tracker: Tracker
    console: Console
    sampler: Sampler | None  # vLLM; None: the model itself
    linear: LinearScore | None = None  # the score of the file that `score` names

    @property
    def run_dir(self) -> Path:
        return self.folder.path


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
    folder = RunFolder(Path(config.output_dir).expanduser())
    try:
        return _prepare(config, accelerator, console, folder, resume)
    except BaseException:
        folder.undo()
        raise


def _prepare(
    config: TrainConfig, accelerator: Accelerator, console: Console, folder: RunFolder, resume: bool
) -> tuple[Session, RunState]:
    continued = check_resume(config, folder, console) if resume else None
    if not resume:
        check_run_directory(config.output_dir)
    processes.wait_for_all()  # every process has seen the directory as it was before one makes it
    inputs = read_inputs(config, console)
    source, model_config, form, given = inputs.source, inputs.model_config, inputs.form, inputs.given
    train_pairs, eval_pairs, prompts = inputs.train_pairs, inputs.eval_pairs, inputs.prompts
    set_seed(config.seed)  # a new adapter's weights are drawn when the model is loaded
    whole = load_model_for_training(source, model_config, config)
    form = dataclasses.replace(form, end_tokens=end_token_ids(whole, form.tokenizer, form.end_of_turn))
    model = processes.prepare_model(whole, accelerator, config.max_grad_norm)
    set_seed((config.seed + processes.rank()) % 2**32)
    linear = None if given is None else LinearScore(given.weights, given.scales)
    data = fingerprint(train_pairs, eval_pairs, prompts)
    if continued is not None:
        state, offsets = restore(continued, model, data, repr(linear), console)
        processes.on_main(lambda: set_model_aside(folder.path))
        processes.on_main(lambda: write_config(config, folder.path))  # what may change, as it is now
    else:
        state, offsets = RunState(), None
        processes.on_main(lambda: start_run_directory(config, folder, given))
    tracker = Tracker(config, folder.path, console, offsets=offsets, step=state.total_steps)
    return Session(
        config=config,
        accelerator=accelerator,
        policy=Policy(model, config.padding_free),
        form=form,
        train_pairs=train_pairs,
        eval_pairs=eval_pairs,
        prompts=prompts,
        data=data,
        folder=folder,
        tracker=tracker,
        console=console,
        sampler=make_sampler(config, source, folder.path),
        linear=linear,
    ), state


@dataclass(frozen=True)
class Inputs:
    """What is read before the weights are: all of it checked, nothing written."""

    source: ModelSource
    model_config: PreTrainedConfig
    form: TextFormat
    train_pairs: list[TokenizedPair]
    eval_pairs: list[TokenizedPair]
    prompts: list[TokenizedPair]
    given: Score | None  # the score of the file that `score` names


def read_inputs(config: TrainConfig, console: Console) -> Inputs:
    """Services, files, the model's configuration and the rows as tokens."""
    check_report_to(config.report_to)
    given = given_score(config)
    for place in filter(None, (config.train_file, config.eval_file, config.prompts_file)):
        check_source(place)
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
        print_warning(console, str(report))
    check_calibration(config, train_pairs)
    return Inputs(source, model_config, form, train_pairs, eval_pairs, prompts, given)


def start_run_directory(config: TrainConfig, folder: RunFolder, given: Score | None) -> None:
    folder.begin()
    write_config(config, folder.path)
    if given is not None:
        write_score(given, folder.path / "score.json")


def write_config(config: TrainConfig, run_dir: Path) -> None:
    write_lines(run_dir / "config.yaml", [config_text(config)])


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


def check_extension(config: TrainConfig) -> None:
    """More `max_steps` than before continue a run as if it had had them from the start, or are refused."""
    reasons = {
        f"lr_schedule: {config.lr_schedule}": config.lr_schedule != "constant",  # falls with the steps that are left
        f"objective: {config.objective}": config.objective == "rejection_sampling",  # all candidates come first
        "keep_best: true": config.keep_best,  # the weights from before are gone once a run is complete
        f"start_weight: {config.start_weight}": config.start_weight > 0,
    }
    if found := [words for words, holds in reasons.items() if holds]:
        raise UserError(
            f"resume: a run with {', '.join(found)} cannot be given more max_steps: start a new one from its model"
        )


def set_model_aside(run_dir: Path) -> None:
    """The model of fewer steps, under the number of them, until the extended run has one."""
    if (run_dir / "model").is_dir():
        steps = load_config(run_dir / "config.yaml").max_steps
        if (run_dir / f"model-{steps}").exists():
            remove_directory(run_dir / f"model-{steps}")
        (run_dir / "model").rename(run_dir / f"model-{steps}")


def check_calibration(config: TrainConfig, pairs: Sequence[TokenizedPair]) -> None:
    number = len({pair.prompt_ids for pair in pairs})
    if config.uses_score and config.score == "calibrated" and number < 2:
        raise UserError(
            f"score: calibrated needs pairs of at least 2 prompts to train on, got {number}; add pairs, or set "
            "score: paper"
        )


def check_resume(config: TrainConfig, folder: RunFolder, console: Console) -> Path:
    """The checkpoint to continue from, if a run of this configuration can be continued, in a folder taken for it.

    Of checkpoints that are broken each is named, and removed: they would count as the newest ones.
    """
    run_dir = folder.path
    saved = run_dir / "config.yaml"
    if not saved.is_file():
        raise UserError(f"resume: there is no run in {run_dir}; start it without --resume")
    processes.on_main(lambda: (folder.take(), refuse_links(run_dir)))
    before = load_config(saved).model_dump()
    grown = config.max_steps > before["max_steps"]
    done, kept = (run_dir / "model").is_dir(), states.checkpoints(run_dir)
    if done and not (grown and kept):
        then = f"more than max_steps: {before['max_steps']} continue it"
        if not kept:
            then = f"it has no checkpoint to go on from (save_steps leaves one): {begin_again(run_dir)}"
        raise UserError(f"resume: the run in {run_dir} is complete; its model is {run_dir / 'model'}; {then}")
    may = (*MAY_CHANGE, *MAY_MOVE, "max_steps") if grown else (*MAY_CHANGE, *MAY_MOVE)
    changed = [k for k, v in config.model_dump().items() if v != before[k] and k not in may]
    if changed:
        moved = "" if config.output_dir == before["output_dir"] else f" --output_dir {shlex.quote(config.output_dir)}"
        raise UserError(
            f"resume: {', '.join(changed)} changed since the run began (it had {changed[0]}: {before[changed[0]]!r}); "
            f"continue with the run's own settings: {continue_command(run_dir)}{moved}; only {', '.join(MAY_CHANGE)} "
            f"may change, and places: {', '.join(MAY_MOVE)}"
        )
    if grown:
        check_extension(config)
    if not kept:
        raise UserError(
            f"resume: {run_dir} holds no checkpoint (save_steps: {before['save_steps']}, save_minutes: "
            f"{before['save_minutes']:g}): {begin_again(run_dir)}"
        )
    chosen: list[str] = []

    def choose() -> None:
        path, broken = states.newest_whole(run_dir)
        chosen.append(path.name)
        for problem in broken:
            console.print(f"{problem}; removed", highlight=False, markup=False, soft_wrap=True)
        newer = states.checkpoints(run_dir)
        for other in newer[newer.index(path) + 1 :]:
            remove_directory(other)

    processes.on_main(choose)
    return run_dir / processes.gather(chosen or [""])[0]


def restore(path: Path, model: nn.Module, data: str, score: str, console: Console) -> tuple[RunState, dict[str, int]]:
    """A checkpoint into the model and the generators; (where the run is, offsets of its files)."""
    parameters, saved = states.load_checkpoint(path)
    states.check_state(path, saved)
    if saved["data"] != data:
        raise UserError("resume: train_file or eval_file no longer holds the pairs that the run began with")
    if saved["score"] != score:
        raise UserError("resume: the file that score names no longer holds the score that the run began with")
    if len(saved["random"]) != processes.world_size():
        raise UserError(
            f"resume: the run has {len(saved['random'])} processes, this is {processes.world_size()}; "
            "launch as many as before"
        )
    before, now = saved["machine"], machine()
    other = [f"{key} {before.get(key)} (now {now[key]})" for key in now if before.get(key) != now[key]]
    if other:
        console.print(
            f"The run began with {', '.join(other)}: what follows is not the uninterrupted run to the bit. "
            f"OMP_NUM_THREADS={before.get('threads')} sets the number of threads",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    processes.on_main(lambda: states.remove_leftovers(path.parent))
    with states.fitting(path.name):
        states.restore_parameters(model, parameters)
        processes.restore_random_state(saved["random"][processes.rank()])
        state = from_tree(RunState, saved["progress"])
        state.stage_state = saved["stage_state"]
    console.print(f"Continuing from {path.name}: {state.stage}, step {state.step}", highlight=False)
    return state, saved["offsets"]


def save(session: Session, state: RunState, stage_state: dict[str, Any] | None, needs: Sequence[str]) -> None:
    """A checkpoint of all of it, by all processes together. needs: directories of the run that it speaks of."""
    tree = {
        "version": states.VERSION,
        "progress": to_tree(dataclasses.replace(state, stage_state=None)),
        "stage_state": stage_state,
        "data": session.data,
        "score": repr(session.linear),
        "random": processes.gather([processes.random_state()]),
        "offsets": session.tracker.offsets,
        "machine": machine(),
    }
    parameters = states.trained_parameters(session.policy.model)
    keep, needs = session.config.save_total_limit, [*needs, *filter(None, [state.best])]
    processes.on_main(lambda: states.save_checkpoint(session.run_dir, state.total_steps, parameters, tree, keep, needs))


def machine() -> dict[str, Any]:
    """What rounding depends on, besides the code: sums of other lengths are added in another order."""
    return {
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def fingerprint(*parts: Sequence[TokenizedPair]) -> str:
    """A hash of the data as tokens: what the model sees of it."""
    digest = hashlib.blake2b(digest_size=16)
    for pairs in parts:
        digest.update(repr(pairs).encode())
    return digest.hexdigest()
