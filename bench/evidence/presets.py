"""The presets as they come: what `gem train` makes of the model by itself, with its gate and its keep_best.

Unlike the objectives, which begin with one SFT model and learn from one pool, each of these runs is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.evidence.scores import measure
from bench.evidence.start import make_config, open_start
from gem.config.read import build_config
from gem.config.settings import TrainConfig
from gem.loop import TrainResult, train


@dataclass(frozen=True)
class Preset:
    """A row: a preset, and the settings that are not the preset's own."""

    key: str
    words: str
    preset: str
    changes: dict[str, Any] = field(default_factory=dict)


# The rates of the demo and of the objectives' rows.
_RATES = {"sft_learning_rate": 1e-4, "sft_batch_size": 4, "learning_rate": 1e-4}
ENDINGS = {
    "gate": "the gate kept SFT's model",
    "keep_best": "keep_best kept SFT's model",
    "guard": "a guard ended it early",
    "trained": "trained",
}
PRESET_ROWS = (
    Preset("preset_safe", "`safe`", "safe"),
    Preset("preset_safe_rates", "`safe`, the demo's learning rates", "safe", _RATES),
    Preset("preset_paper", "`paper`", "paper"),
)


def run_preset(
    folder: Path, row: Preset, model: str, files: dict[str, Path], seed: int, common: dict[str, Any],
    sizes: dict[str, int],
) -> dict[str, Any]:  # fmt: skip
    """Trains the model twice, with SFT alone and whole, and measures both alike; the runs are removed."""
    root = folder / row.key

    def run(name: str, **more: Any) -> TrainResult:
        # What an interrupted command left is begun anew.
        shutil.rmtree(root / name, ignore_errors=True)
        return train(preset_config(root / name, row, model, files, seed, common, **more), Console(quiet=True))

    def measured(model_dir: Path) -> dict[str, Any]:
        config = make_config(root, "measured", str(model_dir), files, seed, **common)
        return measure(open_start(str(model_dir), files, config), sizes)

    sft = run("sft", max_steps=0, eval_generate=0, eval_sample=0)
    whole = run("whole")
    before = measured(sft.model_dir)
    # Weights that are the same to the bit give the same samples.
    after = before if same_weights(sft.model_dir, whole.model_dir) else measured(whole.model_dir)
    end = end_of(whole)
    shutil.rmtree(root)
    return {**after, "sft": before, "end": end}


def preset_config(
    folder: Path, row: Preset, model: str, files: Mapping[str, Path], seed: int, common: Mapping[str, Any], **more: Any
) -> TrainConfig:
    """What is not named here is the preset's. The pairs held out of the run are not those that the table is made of."""
    own = {name: value for name, value in common.items() if name != "num_generations"}
    return build_config({
        **own, **row.changes, **more,
        "preset": row.preset, "seed": seed, "model": model, "output_dir": str(folder),
        "train_file": str(files["given"]), "prompts_file": str(files["pool"]), "eval_file": str(files["validation"]),
    })  # fmt: skip


def same_weights(one: Path, other: Path) -> bool:
    """Whether two model directories have the same files of weights, byte for byte."""
    names = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in (one, other)]
    return names[0] == names[1] and all((one / name).read_bytes() == (other / name).read_bytes() for name in names[0])


def end_of(result: TrainResult) -> dict[str, Any]:
    """What the run itself said: how it ended (`ENDINGS`), and the lines of gate, guards and keep_best."""
    rows = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    said = [row for row in rows if row.get("done")]
    stages = list(result.evaluations)
    if stages[-1] == "SFT":
        ending = "gate"
    elif result.saved != stages[-1]:
        ending = "keep_best"
    else:
        ending = "guard" if any(row.get("action") == "stop" for row in said) else "trained"
    words = [" ".join(str(row[name]) for name in ("words", "guards", "done") if row.get(name)) for row in said]
    return {"ending": ending, "said": words}
