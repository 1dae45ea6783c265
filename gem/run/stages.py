"""The stages of a run: SFT, then SEGA, DPO on the best and worst candidate or the given pairs, or SFT on the best one.

A stage knows its trainer, how many steps it has, and how to take one. Which pairs a step sees is a function of the
seed and the step alone, so a stage continues anywhere.
"""

from __future__ import annotations

import dataclasses
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gem.checkpoint import states
from gem.config.settings import Scoring, TrainConfig
from gem.data.batches import TokenizedPair
from gem.errors import UserError
from gem.model.forward import measured_stats, pair_logprobs
from gem.model.starting_policy import StartingPolicy
from gem.parallel import deepspeed, processes
from gem.rollout.sample import roll_out
from gem.run.metrics import fork_repetition, rollout_metrics
from gem.run.session import Session
from gem.scoring.score import ScoredRollout, score_rollout
from gem.terminal.console import print_warning
from gem.update.deepspeed_optimizer import DeepSpeedTrainer
from gem.update.dpo import dpo_step, filtered_pairs
from gem.update.optimizer import StepResult, Trainer
from gem.update.rejection import best_of_each, choose_winners, rejection_metrics
from gem.update.sega import mean_kl, sega_step
from gem.update.sft import sft_step
from gem_kernels import LinearScore

STARTING_POLICY = "starting-policy"


class Stage(ABC):
    """`num_steps` times `take_step`."""

    name: str
    is_objective = True
    samples_once = False  # all candidates before the first step

    def __init__(self, session: Session, *, num_steps: int, learning_rate: float, iterations: int = 1) -> None:
        config = session.config
        self.session, self.config, self.num_steps = session, config, num_steps
        self.policy = session.policy
        self.scoring: Scoring = config  # until a guard lowers its fork_weight
        self.linear: LinearScore | None = session.linear  # None: the paper's
        self.reference: StartingPolicy | None = None
        self._reference_is_saved = False
        self.empty_steps = 0  # in a row, of candidates of which none counts
        self._warned_of_cut_off = False
        kind = Trainer if deepspeed.engine_of(self.policy.model) is None else DeepSpeedTrainer
        total_steps = num_steps * iterations
        self.trainer = kind(
            self.policy, session.accelerator, config, learning_rate=learning_rate, total_steps=total_steps
        )

    @property
    def needs_reference(self) -> bool:
        return False

    @abstractmethod
    def take_step(self, step: int) -> StepResult:
        """Step number `step`, from 0."""

    def finish(self) -> None:
        """After the last step: the mean with the weights before the stage, where that is asked for."""
        if self.is_objective and self.config.start_weight > 0 and self.reference is not None:
            self.reference.average_into_model(self.config.start_weight)

    def begin(self) -> None:
        """Before the first step of all: the policy as it is now is the starting policy."""
        if self.needs_reference:
            self.reference = StartingPolicy(self.policy.model)

    def save_reference(self) -> None:
        """The starting policy onto the disk, before the first checkpoint that needs it."""
        if self.reference is None or self._reference_is_saved:
            return
        run_dir, state = self.session.run_dir, self.reference.state_dict()
        then = f"; {states.where_to_continue(run_dir)}"
        processes.on_main(lambda: states.save_state(run_dir / STARTING_POLICY, state, {}, then=then))
        self._reference_is_saved = True

    def state_dict(self) -> dict[str, Any]:
        """Without the starting policy, which `save_reference` puts on the disk once."""
        linear = self.linear and {"weights": dict(self.linear.weights), "scales": dict(self.linear.scales)}
        state = {"name": self.name, "trainer": self.trainer.state_dict(), "linear": linear}
        return {**state, "fork_weight": self.scoring.fork_weight, "empty_steps": self.empty_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state["trainer"])
        self.scoring = self.scoring.changed(fork_weight=state["fork_weight"])
        self.empty_steps = state["empty_steps"]
        self.linear = LinearScore(**state["linear"]) if state.get("linear") else self.session.linear
        if self.needs_reference:
            self.reference = StartingPolicy(self.policy.model)
            kept, _ = states.load_checkpoint(self.session.run_dir / STARTING_POLICY)
            self.reference.load_state_dict(kept)
            self._reference_is_saved = True

    def sample(self, pairs: Sequence[TokenizedPair], step: int) -> ScoredRollout:
        """Cognitive filtering: G candidates for each prompt, scored from their own entropies."""
        session, config = self.session, self.config
        if session.sampler is not None:
            session.sampler.update(self.policy.model, session.form.tokenizer)
        rollout = roll_out(
            self.policy,
            session.form,
            [pair.prompt_ids for pair in pairs],
            config,
            seed=config.seed,
            step=step,
            batch_size=config.rollout_batch_size,
            stats_temperature=config.score_temperature,
            sampler=session.sampler,
        )
        batch_size = config.micro_batch_size
        return score_rollout(self.policy, rollout, self.scoring, linear=self.linear, batch_size=batch_size)

    def check_candidates(self, scored: ScoredRollout, step: int) -> None:
        """Says once where all candidates were cut off, and ends the run after `max_empty_steps` steps of none that
        count: such steps are skipped, and the weights would stay what they are without a word."""
        config = self.config
        cut_off = bool(scored.rollout.truncated.all())
        empty = not bool(scored.scores.valid.any())
        self.empty_steps = self.empty_steps + 1 if empty else 0
        why = "no candidate counts"
        if cut_off:
            why = f"every candidate was cut off at max_completion_length ({config.max_completion_length} tokens)"
        elif config.no_answer == "exclude" and empty:
            why = "no candidate has an answer that counts (no_answer: exclude)"
        if self.empty_steps >= config.max_empty_steps:
            raise UserError(
                f"{self.name}, step {step}: {why}, {self.empty_steps} steps in a row, so nothing was learned; raise "
                "max_completion_length, or set mask_truncated: false or no_answer: tail, in a new run"
            )
        if (cut_off and not self._warned_of_cut_off) or self.empty_steps == 1:
            self._warned_of_cut_off = True
            then = "the step is skipped" if empty else "their scores are those of unfinished answers"
            self.session.console.print(
                f"Warning: {self.name}, step {step}: {why}; {then}", highlight=False, markup=False, soft_wrap=True
            )

    def on_candidates(self, result: StepResult, scored: ScoredRollout, ref_logprobs: Tensor | None) -> StepResult:
        """The step with what its candidates were."""
        row = {**rollout_metrics(scored), "gem/fork_repetition": fork_repetition(scored, self.scoring.top_m)}
        if ref_logprobs is not None:
            row["kl"] = mean_kl(scored, ref_logprobs)
        if self.config.guards == "lower_fork_weight":
            row["gem/fork_weight"] = self.scoring.fork_weight
        note = ", ".join(filter(None, [result.note, f"score {row['gem/score']:.3f}"]))
        return dataclasses.replace(result, metrics={**result.metrics, **row}, note=note, scored=scored)

    def reference_logprobs(self, scored: ScoredRollout) -> Tensor | None:
        if self.reference is None:
            return None
        config = self.config
        with self.reference.active():
            return measured_stats(
                self.policy,
                scored.rollout.batch,
                temperature=config.score_temperature,
                batch_size=config.micro_batch_size,
            ).logprobs

    def batch(self, step: int) -> list[TokenizedPair]:
        return batch_at(self.session.prompts, self.config.prompts_per_step, self.config.seed + 1, step)


class Sft(Stage):
    """`sft_epochs` passes over the chosen answers, each in its own seeded order."""

    name = "SFT"
    is_objective = False

    def __init__(self, session: Session) -> None:
        config = session.config
        per_epoch = -(-len(session.train_pairs) // config.sft_batch_size)
        num_steps = config.sft_epochs * per_epoch
        super().__init__(session, num_steps=num_steps, learning_rate=config.sft_learning_rate)

    def take_step(self, step: int) -> StepResult:
        pairs = batch_at(self.session.train_pairs, self.config.sft_batch_size, self.config.seed, step)
        return sft_step(self.trainer, pairs, pad_id=self.session.form.pad_id)


class Sega(Stage):
    """Candidates of the policy as it is, their scores, `num_iterations` optimizer steps on them."""

    name = "SEGA"

    def __init__(self, session: Session) -> None:
        config = session.config
        super().__init__(
            session,
            num_steps=config.max_steps,
            learning_rate=config.learning_rate,
            iterations=config.num_iterations,
        )

    @property
    def needs_reference(self) -> bool:
        return self.config.beta > 0 or self.config.guards != "off" or self.config.start_weight > 0

    def take_step(self, step: int) -> StepResult:
        scored = self.sample(self.batch(step), step)
        ref = self.reference_logprobs(scored)
        result = sega_step(self.trainer, scored, self.config, ref_logprobs=ref)
        return self.on_candidates(result, scored, ref)


class Dpo(Stage):
    """DPO on the given pairs."""

    name = "DPO"

    def __init__(self, session: Session) -> None:
        config = session.config
        super().__init__(session, num_steps=config.max_steps, learning_rate=config.learning_rate)

    @property
    def needs_reference(self) -> bool:
        return True

    def take_step(self, step: int) -> StepResult:
        config = self.config
        return self.step_on(batch_at(self.session.train_pairs, config.prompts_per_step, config.seed + 1, step))

    def step_on(self, pairs: Sequence[TokenizedPair]) -> StepResult:
        pad_id = self.session.form.pad_id
        with self.reference.active():
            ref = pair_logprobs(self.policy, pairs, pad_id=pad_id, batch_size=self.config.micro_batch_size)
        return dpo_step(self.trainer, pairs, ref, self.config, pad_id=pad_id)


class FilteredDpo(Dpo):
    """DPO on the best and the worst candidate of each prompt, by their scores."""

    name = "filtered DPO"

    def take_step(self, step: int) -> StepResult:
        scored = self.sample(self.batch(step), step)
        ref = self.reference_logprobs(scored) if self.config.guards != "off" else None
        pairs = filtered_pairs(scored)
        result = self.step_on(pairs) if pairs else dataclasses.replace(self.trainer.skip(), note="no pair")
        return self.on_candidates(result, scored, ref)


class RejectionSampling(Stage):
    """Candidates for max_steps * prompts_per_step prompts, all of the policy as it is; SFT on the best by the score."""

    name = "rejection sampling"
    samples_once = True

    def __init__(self, session: Session) -> None:
        config = session.config
        super().__init__(session, num_steps=config.max_steps, learning_rate=config.learning_rate)
        self.winners: list[TokenizedPair] = []
        self.scored: ScoredRollout | None = None
        self.first_row: dict[str, float] = {}  # of the candidates: the first step's metrics have it

    @property
    def needs_reference(self) -> bool:
        return self.config.start_weight > 0

    def begin(self) -> None:
        super().begin()
        config = self.config
        number = min(config.max_steps * config.prompts_per_step, len(self.session.prompts))
        self.scored = self.sample(batch_at(self.session.prompts, number, config.seed + 1, 0), 0)
        share = config.rejection_share
        winners = best_of_each(self.scored) if share == 1 else choose_winners(self.scored, share)
        self._learn([winner.pair for winner in winners])
        self.first_row = {**rejection_metrics(self.scored, winners), **rollout_metrics(self.scored)}
        if not winners:
            words = "no candidate ended with an answer"
            if bool(self.scored.rollout.truncated.all()):
                words += f" (every one was cut off at max_completion_length: {config.max_completion_length} tokens)"
            words += ", so there is nothing to learn; raise max_completion_length, or sft_epochs"
            print_warning(self.session.console, f"{self.name}: {words}")

    def _learn(self, winners: list[TokenizedPair]) -> None:
        self.winners = winners
        self.num_steps = self.config.rejection_epochs * -(-len(winners) // self.config.prompts_per_step)
        self.trainer.total_steps = self.num_steps

    def state_dict(self) -> dict[str, Any]:
        ids = [(list(pair.prompt_ids), list(pair.chosen_ids)) for pair in self.winners]
        return {**super().state_dict(), "winners": ids}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._learn([TokenizedPair(tuple(prompt), tuple(ids), (), None) for prompt, ids in state["winners"]])

    def take_step(self, step: int) -> StepResult:
        pairs = batch_at(self.winners, self.config.prompts_per_step, self.config.seed + 2, step)
        result = sft_step(self.trainer, pairs, pad_id=self.session.form.pad_id)
        if step > 0:
            return result
        return dataclasses.replace(result, metrics={**result.metrics, **self.first_row}, scored=self.scored)


OBJECTIVES: dict[str, type[Stage]] = {
    "sega": Sega,
    "filtered_dpo": FilteredDpo,
    "dpo": Dpo,
    "rejection_sampling": RejectionSampling,
}


def planned_stages(config: TrainConfig) -> list[type[Stage]]:
    """The stages of a run, in order; those of no steps are left out."""
    stages: list[type[Stage]] = [Sft] if config.sft_epochs > 0 else []
    return [*stages, OBJECTIVES[config.objective]] if config.max_steps > 0 else stages


def batch_at(pairs: Sequence[TokenizedPair], size: int, seed: int, step: int) -> list[TokenizedPair]:
    """Batch number `step`, from 0: batches of `size` over seeded permutations, the last of a permutation smaller."""
    epoch, place = divmod(step, -(-len(pairs) // size))
    order = list(pairs)
    random.Random(seed * 1_000_003 + epoch).shuffle(order)
    return order[place * size : (place + 1) * size]
