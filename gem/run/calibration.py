"""Between SFT and the objective: the score that is trained on, fitted or given, and tested on given pairs.

Everything here is a function of the weights, the seed and the step, so a run that was cut off within it comes to the
same score again.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import torch

from gem.calibration.features import CALIBRATED, linear_score
from gem.calibration.fit import PairCalibration
from gem.calibration.measure import (
    SCALE_PROMPTS,
    PromptIds,
    calibrate_policy,
    candidate_features,
    known_answers,
    own_candidates,
    pair_features,
    pairs_hash,
    prompts_to_sample,
    right_and_wrong,
)
from gem.calibration.score_file import Score, Verdict, write_score
from gem.calibration.verdict import (
    FITTED_TO,
    TRAINED_ON,
    PairFeatures,
    fixed_score_verdict,
    pair_accuracy,
    verdict_on_others,
)
from gem.config.settings import TrainConfig
from gem.data.batches import TokenizedPair
from gem.errors import UserError
from gem.evaluation.evaluate import Evaluation
from gem.parallel import processes
from gem.progress import progress
from gem.run.session import RunState, Session
from gem.run.stages import Stage
from gem.scoring.score import ScoredRollout, paper_score
from gem.statistics import Estimate
from gem.terminal.console import print_warning
from gem_kernels import LinearScore


def measure_score(stage: Stage, state: RunState) -> dict[str, Any] | None:
    """Fits the score (`score: calibrated`) and tests it, or tests the one that is there; the line of the metrics.

    None where nothing was to be done. What it says: `verdict` and its `words`, the pair accuracy on pairs of
    train_file (of a fitted score held out, prompt by prompt) and on held-out pairs, and a fitted score's weights.
    A fitted score becomes the stage's, score-N.json (N steps of the run) and score.json.
    """
    session, config = stage.session, stage.config
    if not config.uses_score or (config.score != "calibrated" and config.gate == "off"):
        return None
    pairs = calibration_pairs(session)
    row: dict[str, Any] = {"stage": "calibration", "step": state.step, "score": config.score}
    fitted: PairCalibration | None = None
    score: Score | None = None
    try:
        with progress(session.console, "Calibration", len(pairs)) as bar:
            given = pair_features(
                session.policy, session.form, pairs, stage.scoring, batch_size=config.eval_batch_size, bar=bar
            )
        if config.score == "calibrated":
            fitted = fit_score(stage, state, given, pairs)
            score = as_score(fitted, stage, state, pairs)
            stage.linear = LinearScore(score.weights, score.scales)
            accuracy, verdict = score.pair_accuracy[CALIBRATED], score.verdict
            row |= {"weights": score.weights, "weight_intervals": score.weight_intervals, "scales": score.scales}
            row |= {"l2": score.l2, "scales_from": score.scales_from, "fitted_to": score.fitted_to}
        else:
            found, verdict = fixed_score_verdict(
                given.chosen, given.rejected, given.prompts, used_score(stage), which="of train_file", seed=config.seed
            )
            accuracy = found[CALIBRATED]
    except UserError as problem:
        if config.score == "calibrated":
            raise
        session.console.print(f"Calibration: the score could not be tested: {problem}", highlight=False)
        return None
    others = held_out_features(session) if watches_score(config) else None
    held_out = remember_held_out(stage, state, others)
    verdict = unseen_verdict(stage, fitted, verdict, others, held_out)
    if score is not None:
        write_scores(session, state, score.model_copy(update={"verdict": verdict}))
    row |= {"verdict": verdict.kind, "words": verdict.words, "num_pairs": accuracy.count}
    row |= {"pair_accuracy": accuracy.value, "pair_accuracy_low": accuracy.low, "pair_accuracy_high": accuracy.high}
    if held_out is not None:
        row |= {
            "eval/score_pair_accuracy": held_out.value,
            "eval/score_pair_accuracy_low": held_out.low,
            "eval/score_pair_accuracy_high": held_out.high,
        }
    say(session, verdict, held_out)
    return row


def unseen_verdict(
    stage: Stage,
    fitted: PairCalibration | None,
    verdict: Verdict,
    others: PairFeatures | None,
    held_out: Estimate | None,
) -> Verdict:
    """`verdict`, or, where SFT has trained on the given pairs or a score may be fitted to them, that of other pairs."""
    config = stage.config
    if fitted is not None and config.sft_epochs:
        return fitted.verdict_after_sft(others, fork_weight=config.fork_weight, seed=config.seed)
    if config.sft_epochs:
        return verdict_on_others(verdict, held_out, TRAINED_ON)
    from_file = config.score not in ("paper", "calibrated")
    return verdict_on_others(verdict, held_out, FITTED_TO) if from_file else verdict


def gate_is_open(stage: Stage, state: RunState, row: dict[str, Any] | None) -> bool:
    """Writes the line and does what `gate` says of a score that is not informative. False: the objective ends."""
    session, gate = stage.session, stage.config.gate
    if row is None:
        return True
    informative = row["verdict"] == "informative"
    done = "" if informative or gate == "off" else "warned" if gate == "warn" else f"{stage.name} is not run"
    if done and gate == "stop" and state.step:
        done = f"{stage.name} ends after {state.step} steps"
    session.tracker.write({**row, "gate": gate, "done": done}, state.total_steps)
    if not done:
        return True
    why = "explained by length" if row["verdict"] == "explained_by_length" else "not shown to be informative"
    if gate == "warn":
        print_warning(
            session.console,
            f"Warning: the score is {why}; training on it may harm. gate: stop would end here, gate: off is silent",
        )
        return True
    print_warning(session.console, f"gate: {done}, because its score is {why}; the model so far is saved")
    return False


def fit_score(stage: Stage, state: RunState, given: PairFeatures, pairs: list[TokenizedPair]) -> PairCalibration:
    """The score that the pairs ask for under the policy as it is now."""
    config = stage.config
    prompts = prompts_to_sample(pairs)
    if config.calibrate_on == "pairs":
        prompts = dict(list(known_answers(pairs).items())[:SCALE_PROMPTS])
    candidates = calibration_candidates(stage, state, list(prompts))
    own = None if candidates is None else right_and_wrong(candidates, list(prompts), list(prompts.values()))
    return calibrate_policy(
        given, candidates, own, features=config.score_features, fit_to=config.calibrate_on,
        fork_weight=config.fork_weight, seed=config.seed,
    )  # fmt: skip


def as_score(fitted: PairCalibration, stage: Stage, state: RunState, pairs: list[TokenizedPair]) -> Score:
    name = f"{stage.session.run_dir.name}, after {state.total_steps} steps"
    return fitted.score(model=name, pairs_hash=pairs_hash(pairs), top_m=stage.config.top_m)


def calibration_candidates(stage: Stage, state: RunState, prompts: list[PromptIds]) -> ScoredRollout | None:
    """The policy's own candidates; None where none are asked for, or no prompt has two that count."""
    session, config = stage.session, stage.config
    if not config.calibration_generations:
        return None
    if session.sampler is not None:
        session.sampler.update(session.policy.model, session.form.tokenizer)
    found = own_candidates(
        session.policy,
        session.form,
        prompts,
        stage.scoring,
        config.changed(num_generations=config.calibration_generations),
        seed=config.seed + 1,
        step=state.step,
        batch_size=config.rollout_batch_size,
        sampler=session.sampler,
    )
    if (candidate_features(found)[1].sum(1) >= 2).any():
        return found
    session.console.print(
        "Calibration: no prompt has two valid candidates; the scales are those of the pairs", highlight=False
    )
    return None


def calibration_pairs(session: Session) -> list[TokenizedPair]:
    """The same pairs throughout a run: at most `calibration_pairs` of train_file, drawn by the seed."""
    pairs = list(session.train_pairs)
    random.Random(f"calibration {session.config.seed}").shuffle(pairs)
    return pairs[: session.config.calibration_pairs]


def write_scores(session: Session, state: RunState, score: Score) -> None:
    def write() -> None:
        for name in (f"score-{state.total_steps}.json", "score.json"):
            write_score(score, session.run_dir / name)

    processes.on_main(write)


def watches_score(config: TrainConfig) -> bool:
    """Whether evaluations measure the pair accuracy of the score on held-out pairs."""
    return config.uses_score and (config.score != "paper" or config.guards != "off" or config.keep_best)


def with_score(
    result: Evaluation, session: Session, linear: LinearScore | None, given: PairFeatures | None = None
) -> Evaluation:
    """The evaluation with the held-out pair accuracy of the score: `linear`, or the paper's where it is trained on.

    given: the features of the held-out pairs, where they are known.
    """
    config = session.config
    if not watches_score(config) or (config.score == "calibrated" and linear is None):
        return result
    given = given or held_out_features(session)
    if given is None:
        return result
    names_weights = _names_and_weights(linear or paper_score(config))
    margins = linear_score(given.chosen, *names_weights) - linear_score(given.rejected, *names_weights)
    if not np.isfinite(margins).all():
        return result
    wins = torch.from_numpy((np.sign(margins) + 1) / 2)
    return dataclasses.replace(result, score=pair_accuracy(margins, given.prompts, config.seed), score_wins=wins)


def held_out_features(session: Session) -> PairFeatures | None:
    """Of the held-out pairs under the policy as it is; None where none has an answer, and no_answer is exclude."""
    try:
        return pair_features(
            session.policy, session.form, session.eval_pairs, session.config, batch_size=session.config.eval_batch_size
        )
    except UserError:
        return None


def remember_held_out(stage: Stage, state: RunState, given: PairFeatures | None) -> Estimate | None:
    """The held-out pair accuracy of the stage's score; at the start of the objective it is kept with the evaluation."""
    name = list(state.evaluations)[-1]
    found = with_score(state.evaluations[name], stage.session, stage.linear, given)
    if state.step == 0:
        state.evaluations[name] = found
    return found.score


def used_score(stage: Stage) -> tuple[tuple[str, ...], tuple[float, ...]]:
    return _names_and_weights(stage.linear or paper_score(stage.scoring))


def say(session: Session, verdict: Verdict, held_out: Estimate | None) -> None:
    more = ""
    if held_out is not None and "held-out pairs" not in verdict.words:
        more = (
            f" On held-out pairs: {held_out.value:.2f} [{held_out.low:.2f}, {held_out.high:.2f}] of {held_out.count}."
        )
    session.console.print(f"Calibration: {verdict.words}{more}", highlight=False, soft_wrap=True)


def _names_and_weights(linear: LinearScore) -> tuple[tuple[str, ...], tuple[float, ...]]:
    return tuple(linear.weights), tuple(linear.coefficient(name) for name in linear.weights)
