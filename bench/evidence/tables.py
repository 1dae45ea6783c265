"""Result files -> Markdown tables, means over seeds with 95 % intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.evidence.objectives import OBJECTIVES
from bench.evidence.presets import ENDINGS, PRESET_ROWS
from bench.evidence.scores import CALIBRATED_ON_PAIRS
from gem.calibration.features import CALIBRATED
from gem.errors import UserError
from gem.statistics import auroc_within, bootstrap_interval, share_estimate

Results = list[dict[str, Any]]
TABLES = ("pairs", "scores", "objectives", "presets")
SCORE_WORDS = {
    CALIBRATED: "**calibrated**",
    CALIBRATED_ON_PAIRS: "calibrated on the given pairs alone",
    "mean_logprob": "mean log-prob",
    "min_logprob": "smallest log-prob",
    "-mean_entropy": "−mean entropy",
    "-final_entropy": "−final entropy",
    "fork_entropy": "fork entropy",
    "paper": "paper: −final + fork",
    "-length": "−length (shorter is better)",
    "length": "length (longer is better)",
}


def all_tables(out: Path, num_seeds: int) -> dict[str, str]:
    """Those of `TABLES` of whose rows there is something."""
    tables = {}
    base = read_rows(out, 0, "base_scores", folder=out)
    scores = [row for seed in range(num_seeds) for row in read_rows(out, seed, "scores")]
    if base or scores:
        tables["pairs"] = pair_table(base, scores)
    if scores and scores[0]["right"]:
        tables["scores"] = score_table(scores)
    keys = {"sft": "SFT alone"}
    for objective in OBJECTIVES:
        keys |= {objective.key: objective.words}
        keys |= {objective.mean: objective.mean_words} if objective.mean else {}
    results = {key: [row for seed in range(num_seeds) for row in read_rows(out, seed, key)] for key in keys}
    if any(rows and rows[0]["right"] for rows in results.values()):
        tables["objectives"] = objective_table({key: rows for key, rows in results.items() if rows}, keys)
    presets = {
        row.words: [found for seed in range(num_seeds) for found in read_rows(out, seed, row.key)]
        for row in PRESET_ROWS
    }
    if any(rows and rows[0]["right"] for rows in presets.values()):
        tables["presets"] = preset_table({words: rows for words, rows in presets.items() if rows}, came(out))
    return tables


def came(out: Path) -> Results:
    return read_rows(out, 0, "came", folder=out)


def read_rows(out: Path, seed: int, key: str, folder: Path | None = None) -> Results:
    """The row in a list, [] where it has not been run."""
    path = (folder or out / f"seed-{seed}") / f"{key}.json"
    return [{**json.loads(path.read_text()), "seed": seed}] if path.is_file() else []


def pair_table(base: Results, scores: Results) -> str:
    """Share of pairs of which a score prefers the better answer."""
    columns = []
    if base:
        columns.append((f"before SFT, {len(base[0]['given_prompts'])} pairs", base, "given"))
    if scores:
        number = len(scores[0]["given_prompts"])
        columns.append((f"after SFT, its own {number} pairs x {len(scores)} seeds", scores, "given"))
        number = len(scores[0]["held_out"]["paper"])
        columns.append((f"after SFT, {number} held-out pairs", scores, "held_out"))
    lines = [f"| score | {' | '.join(name for name, _, _ in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, words in SCORE_WORDS.items():
        cells = [pair_cell(results, kind, name) for _, results, kind in columns]
        if any(cell != "-" for cell in cells):
            lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def pair_cell(results: Results, kind: str, name: str) -> str:
    """A pair's seeds stay together: held-out pairs are the same for all; a given pair of a file may be in several."""
    if not all(name in result[kind] for result in results):
        return "-"
    wins = [(np.sign(np.array(result[kind][name])) + 1) / 2 for result in results]
    if kind == "held_out":
        groups: Sequence[Any] = list(range(len(wins[0]))) * len(wins)
    else:
        groups = [prompt for result in results for prompt in result["given_prompts"]]
    found = share_estimate(torch.from_numpy(np.concatenate(wins)), groups)
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def score_table(results: Results) -> str:
    """Held-out samples: AUROC within a prompt, best of G, and its difference from one sample."""
    right = torch.tensor([result["right"] for result in results]).double() > 0.5  # [seeds, P, G]
    valid = torch.tensor([result["valid"] for result in results])
    num_seeds, num_prompts, size = right.shape
    single = right.double().mean((0, 2))
    lines = [
        f"| score, {num_seeds} seeds x {num_prompts} problems x {size} samples | AUROC within a problem | "
        f"best of {size} | best of {size} − one sample |",
        "|---|---|---|---|",
        f"| one sample | | {with_interval(single, '')} | |",
    ]
    for name, words in SCORE_WORDS.items():
        scores = torch.tensor([result["samples"][name] for result in results], dtype=torch.float64)
        best = torch.stack([best_of(*parts) for parts in zip(scores, right, valid)]).mean(0)
        cells = (auroc_cell(scores, right, valid), with_interval(best, ""), with_interval(best - single, "+"))
        lines.append(f"| {words} | {' | '.join(cells)} |")
    lines.append(f"| any of {size} right | | {with_interval(right.any(2).double().mean(0), '')} | |")
    return "\n".join(lines) + "\n"


def auroc_cell(scores: torch.Tensor, right: torch.Tensor, valid: torch.Tensor) -> str:
    """Mean over seeds; a problem's seeds are drawn together."""

    def statistic(rows: torch.Tensor) -> float | None:
        found = [auroc_within(s[rows], r[rows], v[rows]) for s, r, v in zip(scores, right, valid)]
        known = [value for value in found if value is not None]
        return sum(known) / len(known) if known else None

    value = statistic(torch.arange(scores.shape[1]))
    if value is None:
        return "-"
    low, high = bootstrap_interval(statistic, range(scores.shape[1]))
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def best_of(scores: torch.Tensor, right: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """[P]: is the valid sample of the highest score right, ties by their mean; 0 without a valid one."""
    shown = scores.masked_fill(~valid, -torch.inf)
    top = (shown == shown.max(1, keepdim=True).values) & valid
    return (top & right).sum(1).double() / top.sum(1).clamp_min(1)


def objective_table(results: dict[str, Results], words: dict[str, str]) -> str:
    """Changes are from SFT alone, of the same seeds, problem by problem and draw by draw: far narrower than two values'
    intervals. Of SFT's samples those count that have the random keys of the other rows' samples."""
    number = min(len(row["right"][0]) for rows in results.values() for row in rows if row["right"])
    results = {key: [first_samples(row, number) for row in rows] for key, rows in results.items()}
    first = next(iter(results.values()))[0]
    lines = [
        f"| {max(map(len, results.values()))} seeds | sampled accuracy ({len(first['right'])} problems x {number}) | "
        f"change from SFT | change of each seed | cut off | preference accuracy ({len(first['won'])} pairs) | "
        "change from SFT | trained on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, rows in results.items():
        right, won = (value_and_change(results, key, kind) for kind in ("right", "won"))
        seeds = seed_changes(results, key)
        cut = (
            f"{sum(row['truncated'] for row in rows) / len(rows):.2f}"
            if all("truncated" in row for row in rows)
            else ""
        )
        lines.append(f"| {words[key]} | {' | '.join(right)} | {seeds} | {cut} | {' | '.join(won)} | {learnt(rows)} |")
    return "\n".join(lines) + "\n"


def first_samples(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {**row, "right": [samples[:number] for samples in row["right"]]}


def seed_changes(results: dict[str, Results], key: str) -> str:
    """The seeds one by one, as the chance of training is among them: values of SFT, changes of the others."""
    if not results[key][0]["right"]:
        return "-"
    means = {row["seed"]: float(of_problems(row).mean()) for row in results.get("sft", []) if row["right"]}
    if key == "sft" or not all(row["seed"] in means for row in results[key]):
        return ", ".join(f"{float(of_problems(row).mean()):.3f}" for row in results[key])
    return ", ".join(f"{float(of_problems(row).mean()) - means[row['seed']]:+.3f}" for row in results[key])


def learnt(rows: Results) -> str:
    """How many winners were learnt and how many of them were right."""
    if not all(row.get("winners") for row in rows):
        return ""
    number = "/".join(str(row["winners"]) for row in rows)
    known = [row["winners_right"] for row in rows if row["winners_right"] is not None]
    return f"{number} winners, {sum(known) / len(known):.2f} right" if known else f"{number} winners"


def of_problems(row: dict[str, Any], kind: str = "right") -> torch.Tensor:
    """[P]: each problem's share of right samples, or whether each pair was won."""
    values = torch.tensor(row[kind], dtype=torch.float64)
    return values.mean(1) if values.dim() == 2 else values


def value_and_change(results: dict[str, Results], key: str, kind: str) -> tuple[str, str]:
    """Mean of a row with its interval, and its mean change from SFT with its; a problem's seeds stay together."""
    rows = results[key]
    if not rows[0][kind]:
        return "-", "-"
    values = torch.stack([of_problems(row, kind) for row in rows]).mean(0)
    starts = {row["seed"]: row for row in results.get("sft", []) if row[kind]}
    if key == "sft" or not all(row["seed"] in starts for row in rows):
        return with_interval(values, ""), "-"
    start = torch.stack([of_problems(starts[row["seed"]], kind) for row in rows]).mean(0)
    return with_interval(values, ""), with_interval(values - start, "+")


def preset_table(results: dict[str, Results], came: Results) -> str:
    """Whole runs of `gem train`: sampled accuracy after the SFT of each, at its end, and how it ended."""
    number = len(next(iter(results.values()))[0]["right"])
    lines = [
        f"| {max(map(len, results.values()))} seeds | after SFT ({number} problems) | at the end | change | "
        "each seed | how each seed ended |",
        "|---|---|---|---|---|---|",
    ]
    if came:
        lines.append(f"| the model as it came | | {with_interval(of_problems(came[0]), '')} | | | |")
    for words, rows in results.items():
        starts = torch.stack([of_problems(row["sft"]) for row in rows])
        ends = torch.stack([of_problems(row) for row in rows])
        seeds = ", ".join(f"{a:.3f} → {b:.3f}" for a, b in zip(starts.mean(1).tolist(), ends.mean(1).tolist()))
        means = starts.mean(0), ends.mean(0)
        cells = with_interval(means[0], ""), with_interval(means[1], ""), with_interval(means[1] - means[0], "+")
        endings = "; ".join(ENDINGS[row["end"]["ending"]] for row in rows)
        lines.append(f"| {words} | {' | '.join(cells)} | {seeds} | {endings} |")
    return "\n".join(lines) + "\n"


def with_interval(values: torch.Tensor, sign: str) -> str:
    low, high = bootstrap_interval(lambda rows: float(values[rows].mean()), range(len(values)))
    return f"{float(values.mean()):{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def marked(path: Path, task: str) -> list[str]:
    """The tables of the task that have a place in a Markdown file; one at least."""
    text = path.read_text(encoding="utf-8")
    found = [name for name in TABLES if f"<!-- {task} {name} -->" in text]
    if not found:
        raise UserError(f"{path}: expected a line <!-- {task} NAME -->, NAME one of {', '.join(TABLES)}, and its end")
    return found


def put_table(path: Path, name: str, table: str) -> None:
    """Puts the table between the lines <!-- NAME --> and <!-- /NAME --> of a Markdown file."""
    text = path.read_text(encoding="utf-8")
    before, first, rest = text.partition(f"<!-- {name} -->\n")
    _, last, after = rest.partition(f"<!-- /{name} -->")
    if not first or not last:
        raise UserError(f"{path}: expected the lines <!-- {name} --> and <!-- /{name} -->")
    path.write_text(f"{before}{first}{table}{last}{after}", encoding="utf-8")
