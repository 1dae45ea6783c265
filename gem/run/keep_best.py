"""`keep_best`: the weights from before the objective are kept on the disk, and saved where it made the model worse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gem.checkpoint import states
from gem.evaluation.evaluate import Evaluation, reward_differences
from gem.parallel import processes
from gem.run.session import RunState, Session
from gem.statistics import Estimate, mean_estimate
from gem.terminal.console import print_warning

KEPT = "before-objective"


@dataclass(frozen=True)
class Change:
    """A held-out accuracy before and after the objective, and their difference, paired by case."""

    name: str
    before: float
    after: float
    difference: Estimate

    @property
    def fell(self) -> bool:
        return self.difference.value < -1e-12  # beyond rounding

    def __str__(self) -> str:
        d = self.difference
        words = f"{self.name} {self.before:.3f} -> {self.after:.3f}"
        return f"{words} (difference {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}], {d.count} cases)"


def keep_weights(session: Session) -> None:
    """What is trained, as it is now, on the disk."""
    parameters = states.trained_parameters(session.policy.model)
    processes.on_main(lambda: states.save_state(session.run_dir / KEPT, parameters, {}))


def changes(session: Session, before: Evaluation, after: Evaluation) -> list[Change]:
    """Sampled accuracy where answers are known; else preference accuracy and the pair accuracy of the score."""
    config, pairs = session.config, session.eval_pairs

    def change(name: str, one: Tensor, other: Tensor, prompts: list[tuple[int, ...]]) -> Change:
        return Change(name, float(one.mean()), float(other.mean()), mean_estimate(other - one, prompts, config.seed))

    if before.sampled_rates is not None and after.sampled_rates is not None:
        prompts = [pair.prompt_ids for pair in pairs[: config.eval_sample] if pair.answer is not None]
        return [change("sampled accuracy", before.sampled_rates, after.sampled_rates, prompts)]
    prompts = [pair.prompt_ids for pair in pairs]
    wins = []
    for evaluation in (before, after):
        differences = reward_differences(evaluation.logprobs, pairs)[config.preference_reduction]
        wins.append((torch.sign(differences) + 1) / 2)
    found = [change("preference accuracy", *wins, prompts)]
    one, other = before.score_wins, after.score_wins
    if one is not None and other is not None and len(one) == len(other):
        groups = prompts if len(one) == len(prompts) else list(range(len(one)))
        found.append(change("pair accuracy of the score", one, other, groups))
    return found


def keep_better(session: Session, state: RunState, before: str, after: str) -> str:
    """The stage whose weights the model has from here on: `before` where an accuracy fell with the objective.

    One line says which and why, on the console and, where the weights go back, in the metrics (stage "guard").
    """
    found = changes(session, state.evaluations[before], state.evaluations[after])
    fell = any(change.fell for change in found)
    name = before if fell else after
    words = "; ".join(map(str, found))
    which = "the model at the start" if name == "start" else f"the model after {name}"
    line = f"keep_best: {words}: {which} is saved"
    if not fell:
        session.console.print(line, highlight=False, soft_wrap=True)
    else:
        print_warning(session.console, line)
        parameters, _ = states.load_checkpoint(session.run_dir / KEPT)
        states.restore_parameters(session.policy.model, parameters)
        done = f"{words}: {which} is saved"
        row = {"stage": "guard", "step": state.step, "guards": ["keep_best"], "action": "keep_best", "done": done}
        session.tracker.write(row, state.total_steps)
    return name


def forget_weights(session: Session) -> None:
    processes.on_main(lambda: states.remove_others(session.run_dir, KEPT))
