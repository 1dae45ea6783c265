"""The plots of docs/benchmarks.md: time and peak memory against rows, and the share of the ceiling."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

OURS = "#c2410c"
# Okabe and Ito's colours, less those near ours.
OTHERS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#777777", "#b8a000", "#000000", "#7a5195", "#4d7c0f", "#94a3b8")
MARKERS = "osD^vPX<>h"


def use_svg() -> None:
    """The look of every plot; the same results give the same file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "gem", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def draw(work: str, kind: str, title: str, rows: Sequence[dict], folder: Path) -> list[tuple[str, str]]:
    """Writes what can be drawn of a work; -> (file name, caption) of each."""
    if work in ("hard", "step", "scores"):
        return []
    use_svg()
    folder.mkdir(parents=True, exist_ok=True)
    colours = styles(sorted({row["rival"] for row in rows}))
    made = []
    sweep = longest_sweep(rows)
    if sweep:
        head, dtype, members = sweep
        where = f"{head}, {dtype}"
        for what, key in (("time", time_of), ("memory", memory_of)):
            name = f"{kind}-{work}-{what}.svg"
            if lines(folder / name, f"{title}\n{where}", members, key, what, colours):
                made.append((name, f"{title}: {what} against rows, {where}"))
    name = f"{kind}-{work}-share.svg"
    bars(folder / name, title, rows, colours)
    return [*made, (name, f"{title}: share of the ceiling")]


def time_of(row: dict) -> float:
    return statistics.median(row["times"]) * 1e3


def memory_of(row: dict) -> float | None:
    return row.get("peak_extra_mib")


def styles(rivals: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and line of each; ours share a colour."""
    chosen, others, ours = {}, 0, 0
    for name in rivals:
        if name.startswith("gem_kernels"):
            chosen[name] = (OURS, "o^sD"[ours % 4], ("-", "--", ":", "-.")[ours % 4])
            ours += 1
        else:
            chosen[name] = (OTHERS[others % len(OTHERS)], MARKERS[others % len(MARKERS)], "-")
            others += 1
    return chosen


def longest_sweep(rows: Sequence[dict]) -> tuple[str, str, list[dict]] | None:
    """The rows of the head and dtype measured at the most numbers of rows, if at two or more."""
    sweeps = defaultdict(list)
    for row in rows:
        sweeps[row["head"], row["dtype"]].append(row)
    (head, dtype), members = max(sweeps.items(), key=lambda item: len({row["rows"] for row in item[1]}))
    return (head, dtype, members) if len({row["rows"] for row in members}) > 1 else None


def mark(row: dict) -> str:
    if row["approximate"]:
        return " (approximate)"
    if row["wrong"]:
        return " (WRONG)"
    return " (no entropy)" if not row["entropy"] and row["work"] != "nll" else ""


def lines(path: Path, title: str, rows: Sequence[dict], key, what: str, colours) -> bool:
    """Log-log lines, one an implementation; False, and no file, where nothing was measured."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    series = defaultdict(dict)
    for row in rows:
        value = key(row)
        if value:
            series[row["rival"] + mark(row), row["rival"]][row["rows"]] = value
    if not series:
        return False
    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    order = sorted(series.items(), key=lambda item: -item[1][max(item[1])] / max(item[1]))
    for (label, rival), points in order:
        colour, marker, line = colours[rival]
        x = sorted(points)
        ours = rival.startswith("gem_kernels")
        axes.plot(x, [points[n] for n in x], line, color=colour, marker=marker, markersize=4.5, label=label,
                  linewidth=2 if ours else 1.2, zorder=3 if ours else 2)  # fmt: skip
    unit = "median time, ms" if what == "time" else "peak extra memory, MiB"
    axes.set(xscale="log", yscale="log", xlabel="rows", ylabel=unit)
    axes.set_xticks(sorted({n for points in series.values() for n in points}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    axes.grid(True, which="major", color="#e5e5e5", linewidth=0.6)
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    save(figure, path)
    return True


def bars(path: Path, title: str, rows: Sequence[dict], colours) -> None:
    """The share of the ceiling of every implementation, at the most rows of each head."""
    import matplotlib.pyplot as plt

    most = {}
    for row in rows:
        place = (row["head"], row["dtype"])
        most[place] = max(most.get(place, 0), row["rows"])
    panels = list(most.items())
    members = [[r for r in rows if (r["head"], r["dtype"], r["rows"]) == (*place, n)] for place, n in panels]
    height = sum(0.24 * len(m) + 0.55 for m in members) + 0.5
    figure, grid = plt.subplots(
        len(panels), 1, figsize=(7.2, height), layout="constrained", sharex=True, squeeze=False,
        height_ratios=[len(m) + 1 for m in members],
    )  # fmt: skip
    for axes, ((head, dtype), count), group in zip(grid[:, 0], panels, members):
        group = sorted(group, key=lambda row: row["share"])
        for y, row in enumerate(group):
            axes.barh(y, row["share"], color=colours[row["rival"]][0] if row["ours"] else "#9aa5b1", height=0.7,
                      hatch="//" if mark(row) else None, edgecolor="white", linewidth=0)  # fmt: skip
            axes.text(row["share"], y, f" {row['share']:.2f}", va="center", fontsize=7.5)
        axes.set_yticks(range(len(group)), [row["rival"] + mark(row) for row in group], fontsize=8)
        axes.set_title(f"{head}, {count:,} rows, {dtype}", fontsize=8.5, loc="left")
        axes.axvline(1.0, color="#444444", linewidth=0.8, linestyle=":")
        axes.margins(x=0.08)
    grid[-1, 0].set_xlabel("share of the ceiling measured in the same run")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    save(figure, path)


def save(figure, path: Path) -> None:
    """SVG without a date, so that the same results give the same file."""
    import matplotlib.pyplot as plt

    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
