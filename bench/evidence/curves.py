"""The learning curves of all rows as one SVG: held-out answers while a row is trained, and of SEGA how far it moved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.evidence.objectives import OBJECTIVES
from bench.evidence.tables import read_rows
from bench.plots import MARKERS, OTHERS, OURS, save, use_svg

PANELS = {
    "held_out_logprob": "log-prob of held-out\nchosen answers, nats",
    "held_out_margin": "chosen − rejected,\nnats",
    "clip_ratio/region_mean": "tokens whose ratio\nis clipped, share",
}


def draw_curves(out: Path, num_seeds: int, path: Path) -> bool:
    """Writes `path`; False, and no file, where no row has a curve. A line is the mean over the seeds of its row."""
    rows = {
        objective.words: [
            curve
            for seed in range(num_seeds)
            for row in read_rows(out, seed, objective.key) or read_rows(out, seed, objective.mean or objective.key)
            if (curve := row["curve"])
        ]
        for objective in OBJECTIVES
    }
    rows = {words: curves for words, curves in rows.items() if curves}
    if not rows:
        return False
    use_svg()
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(len(PANELS), 1, figsize=(8.4, 8.4), layout="constrained", sharex=True)
    for axes, (key, label) in zip(grid, PANELS.items()):
        for i, (words, curves) in enumerate(rows.items()):
            steps, values = mean_curve(curves, key)
            colour = OURS if "rejection" in words else OTHERS[i % len(OTHERS)]
            name = f"{words} ({len(curves)} seed{'s' * (len(curves) > 1)})"
            axes.plot(steps, values, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=4, label=name)
        axes.set_ylabel(label)
        axes.grid(True, color="#e5e5e5", linewidth=0.6)
    grid[-1].set_xlabel("optimizer steps")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    save(figure, path)
    return True


def mean_curve(curves: Sequence[Sequence[dict[str, Any]]], key: str) -> tuple[list[int], list[float]]:
    """Steps that every seed has a value for, and the means of these."""
    found = [{point["step"]: point[key] for point in curve if key in point} for curve in curves]
    steps = sorted(set.intersection(*map(set, found)))
    return steps, [sum(values[step] for values in found) / len(found) for step in steps]
