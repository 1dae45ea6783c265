"""The loop: roll out, score, step, evaluate. Before it a short SFT warm start; a model directory comes out."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from gem.checkpoint import MetricsLog, check_run_directory, make_run_directory, save_model
from gem.config import TrainConfig, save_config
from gem.data import TokenizedPair, load_run_pairs, prompt_format, run_system_prompt
from gem.distributed import make_accelerator
from gem.evaluate import AnswerAccuracy, Evaluation, PreferenceAccuracy, evaluate, summarize
from gem.filtering import ScoredRollout, Scoring, ranking_metrics, score_rollout
from gem.model import context_length, end_token_ids, find_model, load_config, load_model, load_tokenizer
from gem.progress import progress
from gem.rollout import Sampling, roll_out
from gem.trainer import Trainer
from gem.update import SegaUpdate, StepResult, groups_with_gradient, sega_step, sft_step


@dataclass(frozen=True)
class Session:
    """What every stage of a run needs: the model, its tokens, the data as tokens, and where things go."""

    config: TrainConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_tokens: tuple[int, ...]
    train_pairs: list[TokenizedPair]
    eval_pairs: list[TokenizedPair]
    run_dir: Path
    metrics: MetricsLog
    console: Console


@dataclass(frozen=True)
class TrainResult:
    run_dir: Path
    model_dir: Path
    evaluations: dict[str, Evaluation]  # by stage: "start", "SFT", "SEGA", those that were run
    seconds: dict[str, float]  # wall time of each phase


def train(config: TrainConfig, console: Console | None = None) -> TrainResult:
    """One run from the configuration to a saved model. User mistakes are raised before anything is written."""
    console = console or Console()
    set_seed(config.seed)
    clock = Clock()
    session = prepare(config, console)
    clock.lap("loading")
    evaluations = {"start": run_evaluation(session, "start")}
    clock.lap("evaluation")
    if config.sft_epochs > 0:
        run_sft(session)
        clock.lap("SFT")
        evaluations["SFT"] = run_evaluation(session, "SFT")
        clock.lap("evaluation")
    if config.max_steps > 0:
        run_sega(session)
        clock.lap("SEGA")
        evaluations["SEGA"] = run_evaluation(session, "SEGA")
        clock.lap("evaluation")
    model_dir = save_model(session.model, session.tokenizer, session.run_dir / "model")
    clock.lap("saving")
    session.metrics.close()
    return TrainResult(session.run_dir, model_dir, evaluations, clock.seconds)


def prepare(config: TrainConfig, console: Console) -> Session:
    """Checks the data, the paths and the lengths, then loads the model, then makes the run's directory."""
    run_dir = check_run_directory(config.output_dir)
    source = find_model(config.model)
    console.print(f"Loading {source.gguf_file or source.name}", highlight=False)
    tokenizer = load_tokenizer(source)
    form = prompt_format(tokenizer, run_system_prompt(config))
    model_config = load_config(source)
    train_pairs, eval_pairs, reports = load_run_pairs(config, form, context_length(model_config))
    for report in filter(str, reports):
        console.print(str(report), highlight=False)
    model = load_model(source, model_config, config.dtype, config.device)
    make_run_directory(run_dir)
    save_config(config, run_dir / "config.yaml")
    return Session(
        config=config,
        model=model,
        tokenizer=tokenizer,
        end_tokens=end_token_ids(model, tokenizer, form.end_of_turn),
        train_pairs=train_pairs,
        eval_pairs=eval_pairs,
        run_dir=run_dir,
        metrics=MetricsLog(run_dir / "metrics.jsonl"),
        console=console,
    )


def run_sft(session: Session) -> None:
    """`sft_epochs` passes over the chosen answers, each in its own seeded order."""
    config = session.config
    steps_per_epoch = -(-len(session.train_pairs) // config.sft_batch_size)
    total = config.sft_epochs * steps_per_epoch
    trainer = _trainer(session, config.sft_learning_rate, total)
    batches = shuffled_batches(session.train_pairs, config.sft_batch_size, config.seed, config.sft_epochs)
    with progress(session.console, "SFT", total) as bar:
        for step, pairs in enumerate(batches, 1):
            start = time.monotonic()
            result = sft_step(
                trainer,
                pairs,
                pad_id=session.tokenizer.pad_token_id,
                micro_batch_size=config.micro_batch_size,
            )
            session.metrics.write(
                {"stage": "SFT", "step": step, **_step_metrics(result), "step_time": time.monotonic() - start}
            )
            bar.note(f"loss {result.loss:.3f}")
            bar.advance()


def run_sega(session: Session) -> None:
    """`max_steps` times: candidates of the policy as it is, their scores, one step."""
    config = session.config
    trainer = _trainer(session, config.learning_rate, config.max_steps)
    update = sega_update(config)
    batches = shuffled_batches(session.train_pairs, config.prompts_per_step, config.seed + 1)
    with progress(session.console, "SEGA", config.max_steps) as bar:
        for step in range(1, config.max_steps + 1):
            start = time.monotonic()
            scored = sample_and_score(session, next(batches), seed=config.seed * 1_000_003 + step)
            result = sega_step(trainer, scored, update)
            row = {"stage": "SEGA", "step": step, **sega_metrics(scored, result)}
            session.metrics.write({**row, "step_time": time.monotonic() - start})
            bar.note(f"score {row['gem/score']:.3f}")
            bar.advance()


def sample_and_score(session: Session, pairs: Sequence[TokenizedPair], seed: int) -> ScoredRollout:
    """Cognitive filtering: G candidates for each prompt, scored from their own entropies."""
    config = session.config
    rollout = roll_out(
        session.model,
        session.tokenizer,
        [pair.prompt_ids for pair in pairs],
        sampling(config),
        end_token_ids=session.end_tokens,
        marker=config.answer_marker,
        seed=seed,
        batch_size=config.rollout_batch_size,
    )
    return score_rollout(session.model, rollout, scoring(config), batch_size=config.micro_batch_size)


def run_evaluation(session: Session, name: str) -> Evaluation:
    """Evaluates the model as it is, on the same prompts and seed every time, and writes what came to the metrics."""
    config = session.config
    result = evaluate(
        session.model,
        session.tokenizer,
        session.eval_pairs,
        sampling=sampling(config),
        scoring=scoring(config),
        end_token_ids=session.end_tokens,
        marker=config.answer_marker,
        batch_size=config.eval_batch_size,
        reduction=config.preference_reduction,
        num_generate=config.eval_generate,
        num_sample=config.eval_sample,
        seed=config.seed,
        console=session.console,
        name=name,
    )
    session.metrics.write({"stage": "eval", "after": name, **evaluation_metrics(result)})
    return result


def sampling(config: TrainConfig) -> Sampling:
    return Sampling(
        config.num_generations, config.max_completion_length, config.temperature, config.top_p, config.top_k
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
    )


def shuffled_batches(
    pairs: Sequence[TokenizedPair], size: int, seed: int, epochs: int | None = None
) -> Iterator[list[TokenizedPair]]:
    """Batches of `size` over seeded permutations of the pairs, an epoch's last one smaller; no `epochs`: endless."""
    epoch = 0
    while epochs is None or epoch < epochs:
        order = list(pairs)
        random.Random(seed * 1_000_003 + epoch).shuffle(order)
        yield from (order[start : start + size] for start in range(0, len(order), size))
        epoch += 1


def sega_metrics(scored: ScoredRollout, result: StepResult | None) -> dict[str, Any]:
    """One line of metrics.jsonl: TRL's names where TRL has one, gem/ for what is GEM's."""
    batch = scored.rollout.batch
    groups = scored.scores.score.view(-1, batch.num_generations)
    means = summarize(scored)
    tokens = int(batch.lengths.sum())
    zero_groups = len(groups) - len(groups_with_gradient(scored))
    return {
        **(_step_metrics(result) if result else {"loss": 0.0, "grad_norm": 0.0, "skipped": True}),
        "reward": means.score,
        "reward_std": float(groups.std(1).mean()),
        "frac_reward_zero_std": zero_groups / len(groups),
        "entropy": float(scored.entropy.sum()) / tokens,
        "completions/mean_length": means.mean_length,
        "completions/min_length": int(batch.lengths.min()),
        "completions/max_length": int(batch.lengths.max()),
        "completions/clipped_ratio": means.clipped_ratio,
        "gem/score": means.score,
        "gem/h_final": means.h_final,
        "gem/h_fork": means.h_fork,
        "gem/answer_span_found": means.answer_span_found,
        **ranking_metrics(scored),
    }


def evaluation_metrics(result: Evaluation) -> dict[str, Any]:
    row = {f"eval/preference_{key}": value for key, value in dataclasses.asdict(result.preference).items()}
    if result.answers:
        row |= {f"eval/answer_{key}": value for key, value in dataclasses.asdict(result.answers).items()}
    if result.candidates:
        row |= {f"eval/gem/{key}": value for key, value in dataclasses.asdict(result.candidates).items()}
    return {**row, "eval/seconds": result.seconds}


def evaluation_table(evaluations: dict[str, Evaluation]) -> Table:
    """Preference and answer accuracy with 95 % intervals, and the candidates' means, a column for each stage."""
    stages = list(evaluations.values())
    names = {"start": "start", "SFT": "after SFT", "SEGA": "after SEGA"}
    table = Table(title="Held out (how many)", title_justify="left")
    table.add_column("", no_wrap=True)
    for stage in evaluations:
        table.add_column(names.get(stage, stage), justify="right", no_wrap=True)

    def shares(name: str, results: list[PreferenceAccuracy | None] | list[AnswerAccuracy | None]) -> None:
        table.add_row(name, *["-" if r is None else f"{r.accuracy:.3f}" for r in results])
        table.add_row("  95 % interval", *["-" if r is None else f"[{r.low:.3f}, {r.high:.3f}]" for r in results])

    shares(f"preference accuracy ({stages[0].preference.num_pairs})", [e.preference for e in stages])
    problems = stages[0].answers.num_problems if stages[0].answers else 0
    shares(f"answer accuracy ({problems})", [e.answers for e in stages])
    for name, key in (
        ("mean score S", "score"), ("H_final (nats)", "h_final"), ("H_fork (nats)", "h_fork"),
        ("answer span found", "answer_span_found"), ("tokens per completion", "mean_length"),
    ):  # fmt: skip
        table.add_row(name, *["-" if e.candidates is None else f"{getattr(e.candidates, key):.3f}" for e in stages])
    return table


class Clock:
    """Wall time by phase, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.monotonic()

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


def _trainer(session: Session, learning_rate: float, total_steps: int) -> Trainer:
    config = session.config
    return Trainer(
        session.model,
        make_accelerator(config.device),
        max_grad_norm=config.max_grad_norm,
        learning_rate=learning_rate,
        total_steps=total_steps,
        warmup_steps=config.warmup_steps,
        lr_schedule=config.lr_schedule,
        weight_decay=config.weight_decay,
    )


def _step_metrics(result: StepResult) -> dict[str, Any]:
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "num_tokens": result.num_tokens,
    }
