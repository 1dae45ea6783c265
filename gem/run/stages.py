"""The stages of a run: SFT, then SEGA, DPO on the best and worst candidate, or DPO on the given pairs.

A stage knows its trainer, how many steps it has, and how to take one. Which pairs a step sees is a function of the
seed and the step alone, so a stage continues anywhere.
"""

from __future__ import annotations

import dataclasses
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gem import files
from gem.config.settings import TrainConfig
from gem.data.batches import TokenizedPair
from gem.model.forward import measured_stats, pair_logprobs
from gem.model.starting_policy import StartingPolicy
from gem.parallel import deepspeed, processes
from gem.rollout.sample import Sampling, roll_out
from gem.run.guards import Guards
from gem.run.metrics import fork_repetition, rollout_metrics, step_metrics
from gem.run.session import Session
from gem.scoring.score import ScoredRollout, Scoring, score_rollout
from gem.update.deepspeed_optimizer import ZeroTrainer
from gem.update.dpo import dpo_step, filtered_pairs
from gem.update.optimizer import Trainer
from gem.update.sega import SegaUpdate, mean_kl, sega_step
from gem.update.sft import sft_step

_STARTING_POLICY = "starting-policy"


@dataclass(frozen=True)
class Taken:
    """A step that was taken: its line of metrics, a few words for the bar, and the candidates, where there were any."""

    metrics: dict[str, Any]
    note: str
    scored: ScoredRollout | None = None
    prompts: Sequence[Sequence[int]] = field(default=())


class Stage(ABC):
    """`num_steps` times `take_step`."""

    name: str
    is_objective = True

    def __init__(self, session: Session, *, num_steps: int, learning_rate: float, iterations: int = 1) -> None:
        config = session.config
        self.session, self.config, self.num_steps = session, config, num_steps
        self.scoring = scoring(config)
        self.guards = Guards(config)
        self.reference: StartingPolicy | None = None
        kind = Trainer if deepspeed.engine_of(session.model) is None else ZeroTrainer
        self.trainer = kind(
            session.model,
            session.accelerator,
            learning_rate=learning_rate,
            total_steps=num_steps * iterations,
            warmup_steps=config.warmup_steps,
            lr_schedule=config.lr_schedule,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
        )

    @property
    def needs_reference(self) -> bool:
        return False

    @abstractmethod
    def take_step(self, step: int) -> Taken:
        """Step number `step`, from 0."""

    def begin(self) -> None:
        """Before the first step of all: the policy as it is now is the starting policy."""
        if not self.needs_reference:
            return
        self.reference = StartingPolicy(self.session.model)
        if self.config.save_steps:
            state = self.reference.state_dict()
            processes.on_main(lambda: files.save_tensors(self.session.run_dir / _STARTING_POLICY, state))

    def state_dict(self) -> dict[str, Any]:
        """Without the starting policy, which `begin` has put on the disk once."""
        return {
            "name": self.name,
            "trainer": self.trainer.state_dict(),
            "fork_weight": self.scoring.fork_weight,
            "guards": self.guards.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state["trainer"])
        self.guards.load_state_dict(state["guards"])
        self.scoring = dataclasses.replace(self.scoring, fork_weight=state["fork_weight"])
        if self.needs_reference:
            self.reference = StartingPolicy(self.session.model)
            self.reference.load_state_dict(files.load_tensors(self.session.run_dir / _STARTING_POLICY))

    def sample(self, pairs: Sequence[TokenizedPair], step: int) -> ScoredRollout:
        """Cognitive filtering: G candidates for each prompt, scored from their own entropies."""
        session, config = self.session, self.config
        if session.sampler is not None:
            session.sampler.update(session.model, session.tokenizer)
        rollout = roll_out(
            session.model,
            session.tokenizer,
            [pair.prompt_ids for pair in pairs],
            sampling(config),
            end_token_ids=session.end_tokens,
            marker=session.finders,
            seed=config.seed,
            step=step,
            batch_size=config.rollout_batch_size,
            stats_temperature=config.score_temperature,
            sampler=session.sampler,
        )
        return score_rollout(session.model, rollout, self.scoring, batch_size=config.micro_batch_size)

    def rollout_row(self, scored: ScoredRollout, ref_logprobs: Tensor | None) -> dict[str, Any]:
        row = {**rollout_metrics(scored), "gem/fork_repetition": fork_repetition(scored, self.scoring.top_m)}
        if ref_logprobs is not None:
            row["kl"] = mean_kl(scored, ref_logprobs)
        if self.guards.action == "lower_fork_weight":
            row["gem/fork_weight"] = self.scoring.fork_weight
        return row

    def reference_logprobs(self, scored: ScoredRollout) -> Tensor | None:
        if self.reference is None:
            return None
        config = self.config
        with self.reference.active():
            return measured_stats(
                self.session.model,
                scored.rollout.batch,
                temperature=config.score_temperature,
                batch_size=config.micro_batch_size,
                padding_free=config.padding_free,
            ).logprobs

    def batch(self, step: int) -> list[TokenizedPair]:
        return batch_at(self.session.train_pairs, self.config.prompts_per_step, self.config.seed + 1, step)


class Sft(Stage):
    """`sft_epochs` passes over the chosen answers, each in its own seeded order."""

    name = "SFT"
    is_objective = False

    def __init__(self, session: Session) -> None:
        config = session.config
        per_epoch = -(-len(session.train_pairs) // config.sft_batch_size)
        num_steps = config.sft_epochs * per_epoch
        super().__init__(session, num_steps=num_steps, learning_rate=config.sft_learning_rate)

    def take_step(self, step: int) -> Taken:
        config = self.config
        result = sft_step(
            self.trainer,
            batch_at(self.session.train_pairs, config.sft_batch_size, config.seed, step),
            pad_id=self.session.tokenizer.pad_token_id,
            micro_batch_size=config.micro_batch_size,
            padding_free=config.padding_free,
        )
        return Taken(step_metrics(result), f"loss {result.loss:.3f}")


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
        self.update = sega_update(config)

    @property
    def needs_reference(self) -> bool:
        return self.config.beta > 0 or self.config.guards != "off"

    def take_step(self, step: int) -> Taken:
        pairs = self.batch(step)
        scored = self.sample(pairs, step)
        ref = self.reference_logprobs(scored)
        result = sega_step(self.trainer, scored, self.update, ref_logprobs=ref)
        row = {**step_metrics(result), **self.rollout_row(scored, ref)}
        return Taken(row, f"score {row['gem/score']:.3f}", scored, [pair.prompt_ids for pair in pairs])


class Dpo(Stage):
    """DPO on the given pairs."""

    name = "DPO"

    def __init__(self, session: Session) -> None:
        config = session.config
        super().__init__(session, num_steps=config.max_steps, learning_rate=config.learning_rate)

    @property
    def needs_reference(self) -> bool:
        return True

    def take_step(self, step: int) -> Taken:
        return self.step_on(self.batch(step))

    def step_on(self, pairs: Sequence[TokenizedPair]) -> Taken:
        config = self.config
        common = {"pad_id": self.session.tokenizer.pad_token_id, "padding_free": config.padding_free}
        with self.reference.active():
            ref = pair_logprobs(self.session.model, pairs, batch_size=config.micro_batch_size, **common)
        result = dpo_step(
            self.trainer, pairs, ref, dpo_beta=config.dpo_beta, micro_batch_size=config.micro_batch_size, **common
        )
        return Taken(step_metrics(result), f"loss {result.loss:.3f}")


class FilteredDpo(Dpo):
    """DPO on the best and the worst candidate of each prompt, by their scores."""

    name = "filtered DPO"

    def take_step(self, step: int) -> Taken:
        given = self.batch(step)
        scored = self.sample(given, step)
        ref = self.reference_logprobs(scored) if self.config.guards != "off" else None
        pairs = filtered_pairs(scored)
        taken = self.step_on(pairs) if pairs else Taken(step_metrics(None), "no pair")
        row = {**taken.metrics, **self.rollout_row(scored, ref)}
        return Taken(row, f"{taken.note}, score {row['gem/score']:.3f}", scored, [pair.prompt_ids for pair in given])


OBJECTIVES: dict[str, type[Stage]] = {"sega": Sega, "filtered_dpo": FilteredDpo, "dpo": Dpo}


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


def sampling(config: TrainConfig) -> Sampling:
    return Sampling(
        config.num_generations,
        config.max_completion_length,
        config.temperature,
        config.top_p,
        config.top_k,
        config.min_p,
        config.repetition_penalty,
    )


def scoring(config: TrainConfig) -> Scoring:
    return Scoring(
        final_weight=config.final_weight,
        fork_weight=config.fork_weight,
        top_m=config.top_m,
        no_answer=config.no_answer,
        mapping=config.reward_mapping,
        scale=config.reward_scale,
        temperature=config.score_temperature,
        mask_truncated=config.mask_truncated,
        ranking=config.ranking,
        trim=config.trim,
        trim_mad=config.trim_mad,
        trim_share=config.trim_share,
        overlong_buffer=config.overlong_buffer,
        overlong_penalty=config.overlong_penalty,
        max_completion_length=config.max_completion_length,
    )


def sega_update(config: TrainConfig) -> SegaUpdate:
    return SegaUpdate(
        loss_type=config.loss_type,
        max_completion_length=config.max_completion_length,
        temperature=config.score_temperature,
        micro_batch_size=config.micro_batch_size,
        num_iterations=config.num_iterations,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
        beta=config.beta,
        padding_free=config.padding_free,
    )
