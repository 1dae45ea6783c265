"""`gem calibrate`: a score fitted to pairs, for a model given by name or as objects."""

from __future__ import annotations

from rich.console import Console

from gem.calibration.command import CalibrateRequest, calibrate_file
from gem.calibration.score_file import Score
from gem.config.settings import Sampling
from gem.config.use import CalibrateSettings
from gem.data.sources import Source
from gem.model.opened import ModelLike, open_model
from gem.model.run_text import as_in_run


def calibrate_data(
    model: ModelLike, pairs: Source, settings: CalibrateSettings, held_out: Source | None, console: Console
) -> Score:
    """The score and what is known of its worth. `held_out`: other prompts whose samples it is tested on."""
    settings = as_in_run(model, settings, console)
    opened = open_model(model, settings)
    console.print(f"Loading {opened.name}", highlight=False, markup=False)
    sampling = {name: getattr(settings, name) for name in Sampling.model_fields}
    request = CalibrateRequest(
        model=opened.name,
        pairs=pairs,
        split=settings.split,
        eval_file=held_out,
        features=settings.score_features,
        fit_to=settings.calibrate_on,
        sample=settings.num_generations,
        rows=settings,
        sampling=Sampling(**{**sampling, "num_generations": max(1, settings.num_generations)}),
        scoring=settings,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    return calibrate_file(
        request, opened.form, opened.context, lambda: opened.policy(settings.device, settings.dtype), console
    )
