"""Settings of the commands that use a model: each takes sections of a run's settings, and a few of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import model_validator
from typing_extensions import Self

from gem.config.section import setting
from gem.config.settings import SCORE_FEATURES, EvaluationSettings, RowSettings, Sampling, Scoring, Seed, TextSettings
from gem.errors import UserError

Dtype = Annotated[
    Literal["float32", "bfloat16", "auto"],
    setting("float32", "of the weights; auto: bfloat16 on CUDA where the model's own is, else float32"),
]


def given(**values: Any) -> dict[str, Any]:
    """Those that are not None: flags that stand in the line."""
    return {key: value for key, value in values.items() if value is not None}


class UseRows(RowSettings):
    """Rows that are used, not trained on: repeated ones count as often as they stand there."""

    duplicate_rows: Literal["skip", "keep", "error"] = setting("keep", "rows that stood there before")

    def how_to_skip(self, kinds: Iterable[str]) -> str:
        python = ", ".join(f'{kind}_rows="skip"' for kind in kinds)
        return f"leave them out with --skip-bad (Python: {python})"


class UseSettings(Scoring, Sampling, TextSettings):
    """What scoring and answering share."""

    best: bool = setting(False, "of a prompt's candidates only the one of the highest score")
    tokens: bool = setting(False, "each token with its entropy and log-prob")
    top: int = setting(0, "likeliest alternatives of each token, beside tokens; 0: none", ge=0, le=100)
    batch_size: int = setting(8, "prompts per batch", ge=1)
    device: str = setting("auto", "auto, cpu, cuda, ...")
    dtype: Dtype
    seed: Seed

    @model_validator(mode="after")
    def _candidates_are_there(self) -> Self:
        if self.best and not self.num_generations:
            raise UserError(
                "best: there is one of sampled candidates only; set how many: --sample 8 (Python: num_generations=8)"
            )
        if self.top and not self.tokens:
            raise UserError(f"top: expected tokens with it, beside which alternatives stand; got top {self.top} alone")
        return self


class ScoreSettings(UseSettings, UseRows):
    """Of `gem score` and `gem.score`."""

    num_generations: int = setting(0, "sampled candidates per prompt; 0: the given answers are scored", ge=0)
    completion_column: str = setting("completion", "an answer to score; or there are chosen and rejected")
    split: str = setting("train", "of a dataset; a file has none")


class GenerateSettings(UseSettings):
    """Of `gem generate` and `gem.generate`."""

    num_generations: int = setting(1, "candidates", ge=1)
    temperature: float = setting(0.0, "of the sampler; 0: the most likely token", ge=0)

    @model_validator(mode="before")
    @classmethod
    def _several_differ(cls, values: dict) -> dict:
        """One answer is the most likely one; several are drawn at temperature 1."""
        several = values.get("num_generations") not in (None, 1)
        return {"temperature": 1.0, **values} if several and "temperature" not in values else values


class EvaluateSettings(EvaluationSettings, Scoring, Sampling, TextSettings, UseRows):
    """Of `gem evaluate` and `gem.evaluate`."""

    eval_generate: int = setting(0, "problems answered greedily; 0: none", ge=0)
    eval_sample: int = setting(0, "prompts with candidates sampled and scored; 0: none", ge=0)
    preference_reduction: Literal["sum", "mean", "relative"] = setting(  # type: ignore[assignment]
        "sum", "implicit reward: the answer's log-prob, per token, or less that of a reference"
    )
    split: str = setting("test", "of a dataset; a file has none")
    device: str = setting("auto", "auto, cpu, cuda, ...")
    dtype: Dtype


class CalibrateSettings(Scoring, Sampling, TextSettings, UseRows):
    """Of `gem calibrate` and `gem.calibrate`."""

    num_generations: int = setting(4, "candidates of a prompt, for scales and tests; 0: none", ge=0)
    score_features: tuple[str, ...] = setting(SCORE_FEATURES, "the features that the score is made of")
    calibrate_on: Literal["auto", "pairs", "candidates"] = setting(
        "auto",
        "pairs: the given ones; candidates: right and wrong ones of their prompts; auto: these where informative",
    )
    split: str = setting("train", "of a dataset; a file has none")
    batch_size: int = setting(8, "prompts per batch", ge=1)
    device: str = setting("auto", "auto, cpu, cuda, ...")
    dtype: Dtype
    seed: Seed
