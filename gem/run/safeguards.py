"""What a run does when a guard is breached: warn, lower lambda, go back to the best weights, or stop the stage."""

from __future__ import annotations

import dataclasses
from typing import Any

from gem.evaluation.evaluate import Evaluation
from gem.evaluation.report import evaluation_metrics
from gem.parallel import processes
from gem.run import checkpoint
from gem.run.guards import Breach, lowered
from gem.run.session import Progress, Session
from gem.run.stages import Stage


def watch(
    stage: Stage, session: Session, state: Progress, row: dict[str, Any], evaluation: Evaluation | None
) -> list[Breach]:
    """Checks a step's metrics and, where there was one, an evaluation's; carries out `guards` on a breach.

    With `guards: rollback` the weights of the best evaluation so far are kept on the disk. What was done is a line of
    the metrics, stage "guard".
    """
    found = stage.guards.check(row)
    if evaluation is not None:
        found += stage.guards.check(evaluation_metrics(evaluation))
        if not found:
            keep_best(stage, session, state, evaluation.preference.accuracy)
    if found:
        act(stage, session, state, found)
    return found


def act(stage: Stage, session: Session, state: Progress, found: list[Breach]) -> None:
    action, done = stage.guards.action, "warned"
    if action == "lower_fork_weight":
        weight = lowered(stage.scoring.fork_weight)
        stage.scoring = dataclasses.replace(stage.scoring, fork_weight=weight)
        done = f"fork_weight is now {weight:g}"
    elif action == "rollback" and state.best is not None:
        roll_back(stage, session, state)
        done = f"back to the weights of {state.best}"
    elif action == "stop":
        state.step = stage.num_steps
        done = f"{stage.name} stopped"
    for breach in found:
        session.console.print(f"Guard {breach.guard}: {breach.message}; {done}", highlight=False)
    guards = [breach.guard for breach in found]
    line = {"stage": "guard", "step": state.step, "guards": guards, "action": action, "done": done}
    session.tracker.write(line, state.total_steps)


def keep_best(stage: Stage, session: Session, state: Progress, accuracy: float) -> None:
    """The weights and moments as they are, if no evaluation was better; the ones before go with the next checkpoint,
    which no longer speaks of them."""
    if stage.guards.action != "rollback" or accuracy < state.best_accuracy:
        return
    state.best, state.best_accuracy = f"best-{state.total_steps}", accuracy
    path = session.run_dir / state.best
    parameters, moments = checkpoint.trained_parameters(session.model), stage.trainer.state_dict()
    processes.on_main(lambda: checkpoint.save_state(path, parameters, {"trainer": moments}))
    if not session.config.save_steps:
        processes.on_main(lambda: checkpoint.remove_others(session.run_dir, "best-*", state.best))


def roll_back(stage: Stage, session: Session, state: Progress) -> None:
    """Weights and moments of the best evaluation; the learning rate goes on from where it is."""
    parameters, saved = checkpoint.load_checkpoint(session.run_dir / state.best)
    checkpoint.restore_parameters(session.model, parameters)
    num_steps, bad_steps = stage.trainer.num_steps, stage.trainer.bad_steps
    stage.trainer.load_state_dict({**saved["trainer"], "num_steps": num_steps, "bad_steps": bad_steps})
