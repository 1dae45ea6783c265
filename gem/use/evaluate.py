"""`gem evaluate`: what a model is worth on pairs, given by name or as objects."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from gem.config.use import EvaluateSettings
from gem.data.pairs import load_pairs
from gem.data.sources import Source
from gem.errors import UserError
from gem.evaluation.evaluate import CandidateSettings, Evaluation, evaluate
from gem.model.forward import pair_logprobs
from gem.model.opened import ModelLike, open_model
from gem.use.scorer import warn


def evaluate_data(
    model: ModelLike, pairs: Source, settings: EvaluateSettings, reference: ModelLike | None, console: Console
) -> Evaluation:
    """Everything that the settings ask for. `reference`: the model that rewards are relative to."""
    if settings.preference_reduction == "relative" and reference is None:
        raise UserError("--reduction relative: name the model to compare with by --reference")
    opened = open_model(model, settings)
    console.print(f"Loading {opened.name}", highlight=False, markup=False)
    room = settings.max_completion_length if settings.eval_generate or settings.eval_sample else 0
    found, made = load_pairs(pairs, opened.form, opened.context, settings, settings.split, room=room)
    if str(made):
        warn(console, str(made))
    start = None
    if reference is not None:
        other = open_model(reference, settings)
        if other.form.tokenizer.get_vocab() != opened.form.tokenizer.get_vocab():
            raise UserError(
                f"--reference: {other.name} has another vocabulary than MODEL; name the model it was made from"
            )
        policy, form = other.policy(settings.device)
        start = pair_logprobs(policy, found, pad_id=form.pad_id, batch_size=settings.eval_batch_size)
    policy, form = opened.policy(settings.device)
    return evaluate(
        policy,
        form,
        found,
        settings,
        CandidateSettings(settings, settings),
        console=console,
        name=Path(str(pairs)).name,
        reference=start,
    )
