"""`gem evaluate`: what a model is worth on pairs, given by name or as objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from gem.config.use import EvaluateSettings
from gem.data.batches import TokenizedPair
from gem.data.pair_warnings import row_warnings
from gem.data.pairs import load_pairs
from gem.data.sources import Source
from gem.errors import UserError
from gem.evaluation.evaluate import CandidateSettings, Evaluation, evaluate
from gem.model.forward import pair_logprobs
from gem.model.opened import ModelLike, open_model
from gem.model.run_text import as_in_run
from gem.terminal.console import print_warning


def evaluate_data(
    model: ModelLike, pairs: Source, settings: EvaluateSettings, reference: ModelLike | None, console: Console
) -> Evaluation:
    """Everything that the settings ask for. `reference`: the model that rewards are relative to."""
    (result,) = evaluate_sources(model, [pairs], settings, reference, console).values()
    return result


def evaluate_sources(
    model: ModelLike,
    sources: Sequence[Source],
    settings: EvaluateSettings,
    reference: ModelLike | None,
    console: Console,
) -> dict[str, Evaluation]:
    """`evaluate_data` of each source, by its name; all are read before the model is loaded, once."""
    if settings.preference_reduction == "relative" and reference is None:
        raise UserError("--reduction relative: name the model to compare with by --reference")
    settings = as_in_run(model, settings, console)
    opened = open_model(model, settings)
    console.print(f"Loading {opened.name}", highlight=False, markup=False)
    room = settings.max_completion_length if settings.eval_generate or settings.eval_sample else 0
    found: dict[str, list[TokenizedPair]] = {}
    for source in sources:
        if str(source) in found:
            raise UserError(f"{source}: named twice; once is enough")
        rows, made = load_pairs(source, opened.form, opened.context, settings, settings.split, room=room)
        found[str(source)] = rows
        for words in filter(None, (str(made), *row_warnings(str(source), rows))):
            print_warning(console, words)
    starts = {}
    if reference is not None:
        other = open_model(reference, settings)
        if other.form.tokenizer.get_vocab() != opened.form.tokenizer.get_vocab():
            raise UserError(
                f"--reference: {other.name} has another vocabulary than MODEL; name the model it was made from"
            )
        policy, form = other.policy(settings.device, settings.dtype)
        for name, rows in found.items():
            starts[name] = pair_logprobs(policy, rows, pad_id=form.pad_id, batch_size=settings.eval_batch_size)
    policy, form = opened.policy(settings.device, settings.dtype)
    return {
        name: evaluate(
            policy,
            form,
            rows,
            settings,
            CandidateSettings(settings, settings),
            console=console,
            name=Path(name).name,
            reference=starts.get(name),
        )
        for name, rows in found.items()
    }
