"""`python -m bench.report RESULTS.json [MORE.json]` writes docs/benchmarks.md and its plots from result files.

A result file is what `pytest bench/ --benchmark-json=RESULTS.json` wrote: one of a CPU, one of a GPU, or both.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TITLES = {
    "stats": "Logits to log-probs and entropies",
    "stats_backward": "The gradient with respect to the logits",
    "linear_stats": "Hidden states to log-probs and entropies",
    "linear_policy": "Hidden states to a loss of both, with gradients",
    "nll": "Hidden states to mean cross entropy, with gradients",
    "sega": "Hidden states to the SEGA loss, with gradients",
    "sega_padded": "The same of a padded batch, 40 % padding",
    "sega_frozen": "The same with a frozen head, 8 candidates of one prompt",
    "scores": "Entropies to span scores and group advantages",
    "step": "The whole SEGA step",
    "hard": "Hard cases",
}
FLOORS = {
    "stats": "one read of the logits",
    "stats_backward": "one read and one write of the logits; timed: backward alone; memory: of both passes",
    "linear_stats": "one product, 2 N D V flop",
    "linear_policy": "three products",
    "nll": "three products. No entropy is asked for here",
    "sega": "three products. Advantages come from the entropies. Who computes none is given them, and does less",
    "sega_padded": "three products of the rows that count",
    "sega_frozen": "two products: no gradient of the head is asked for",
    "scores": "one read of the entropies",
    "step": "8 flop a weight for each prompt token and each completion token, once",
    "hard": "",
}
GRADIENTS = ("dLogits", "dHidden", "dWeight", "dBody", "dHead", "score", "advantages")


@dataclass(frozen=True)
class Machine:
    facts: dict
    commit: str
    command: str
    date: str


def command_line(arguments: Iterable[str]) -> str:
    return "pytest " + " ".join(shlex.quote(str(a)) for a in arguments)


def load(path: Path) -> tuple[Machine, list[dict], list[dict]]:
    """A result file -> where it was made, its rows, and what was skipped."""
    try:
        data = json.loads(path.read_text())
        facts = data["machine_info"]["bench"]
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{path}: not a result of `pytest bench/ --benchmark-json` ({error})") from None
    commit = data["commit_info"].get("id", "unknown")[:12]
    if data["commit_info"].get("dirty"):
        commit += " with uncommitted changes"
    rows = [
        {**b["extra_info"], "group": b["group"], "times": b["stats"].get("data") or [b["stats"]["median"]]}
        for b in data["benchmarks"]
    ]
    machine = Machine(facts, commit, data.get("command", "pytest bench/"), data["datetime"][:10])
    return machine, rows, data.get("skipped", [])


def work_of(row: dict) -> str:
    """The section a row stands in."""
    return "hard" if "case" in row else row["work"]


def groups_of(rows: Sequence[dict]) -> dict[str, list[dict]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row["group"]].append(row)
    return dict(groups)


def median(row: dict) -> float:
    return statistics.median(row["times"])


def spread(row: dict) -> float:
    """Distance between the quartiles."""
    if len(row["times"]) < 2:
        return 0.0
    low, _, high = statistics.quantiles(row["times"], n=4, method="inclusive")
    return high - low


def unranked(row: dict) -> str:
    """Why a row has no rank; empty where it has one."""
    if row["approximate"]:
        return "approximate by design"
    if row["wrong"]:
        errors, budgets = row["errors"], row["budgets"]
        return "WRONG: " + ", ".join(f"{k} {number(errors[k])} > {number(budgets[k])}" for k in row["wrong"])
    if not row["entropy"] and row["work"] != "nll":
        return "no entropy"
    return ""


def ranked(rows: Sequence[dict]) -> list[tuple[str, dict]]:
    """(rank or "-", row): the ranked by median time, then the others."""
    full = sorted((row for row in rows if not unranked(row)), key=median)
    rest = sorted((row for row in rows if unranked(row)), key=median)
    return [*((str(i + 1), row) for i, row in enumerate(full)), *(("-", row) for row in rest)]


def number(x: float | None) -> str:
    """Two digits of an error; an infinite or undefined one as such."""
    return "" if x is None else f"{x:.1e}"


def milliseconds(x: float) -> str:
    ms = x * 1e3
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def columns(rows: Sequence[dict]) -> list[str]:
    errors = [k for k in ("logprobs", "entropy", *GRADIENTS) if any(k in row["errors"] for row in rows)]
    return ["rank", "implementation", "median ms", "spread ms", "extra MiB", rows[0]["rate_unit"], "share",
            *(f"err {k}" for k in errors), "remarks"]  # fmt: skip


def cells(rank: str, row: dict, head: Sequence[str]) -> list[str]:
    """One line of a table."""
    memory = row.get("peak_extra_mib")
    remarks = "; ".join(x for x in (unranked(row), row["label"]) if x)
    errors = [number(row["errors"].get(name[4:])) for name in head if name.startswith("err ")]
    rate = row["rate"]
    return [
        rank,
        row["rival"],
        milliseconds(median(row)),
        milliseconds(spread(row)) if len(row["times"]) > 1 else "one run",
        "not measured" if memory is None else f"{memory:,.0f}",
        f"{rate:.3f}" if rate < 1 else f"{rate:.1f}",
        f"{row['share']:.2f}",
        *errors,
        remarks,
    ]


def text_tables(rows: Sequence[dict], skipped: Sequence[dict]) -> str:
    """For the terminal: each contest as aligned columns, and who did not take part."""
    lines = []
    for group, members in groups_of(rows).items():
        head = columns(members)
        table = [head, *(cells(rank, row, head) for rank, row in ranked(members))]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines.append(f"\n{group}   ceiling {members[0]['ceiling']:.3g} {members[0]['rate_unit']}")
        lines += ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in table]
    if skipped:
        lines.append("\nskipped:")
        lines += [f"  {name}: {reason} ({count} tests)" for (name, reason), count in reasons(skipped).items()]
    return "\n".join(lines)


def reasons(skipped: Sequence[dict]) -> dict[tuple[str, str], int]:
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for item in skipped:
        counts[item["rival"], item["reason"]] += 1
    return dict(counts)


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    out = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*out, *("| " + " | ".join(line) + " |" for line in lines)])


def where(machine: Machine) -> str:
    facts = machine.facts
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    cores = f", {facts['cores']} cores, {facts['threads']} threads" if facts["kind"] == "cpu" else ""
    return (
        f"{facts['device']}{cores}; Python {facts['python']}, {versions}. "
        f"Load average at the end {facts['load']}. Commit {machine.commit}, {machine.date}:\n\n    {machine.command}\n"
    )


def heading(row: dict) -> str:
    if "case" in row:
        source = "from logits" if row["work"] == "stats_backward" else "from hidden states"
        return f"{row['case']}, {source}, [{row['rows']}, {row['vocab']}] {row['dtype']}"
    if row["work"] in ("scores",):
        return row["label"] + " entropies, ragged"
    size = f"N {row['rows']:,}, V {row['vocab']:,}" + (f", D {row['hidden']:,}" if row["work"][:5] != "stats" else "")
    return f"{row['head']}: {size}, {row['dtype']}; {row['data']}"


def part(path: Path, docs: Path) -> str:
    """The part of the page made from one result file; writes its plots."""
    from . import plots

    machine, rows, skipped = load(path)
    kind = machine.facts["kind"]
    text = [where(machine)]
    for work, title in TITLES.items():
        members = [row for row in rows if work_of(row) == work]
        if not members:
            continue
        floor = f"The least it takes: {FLOORS[work]}.\n" if FLOORS[work] else ""
        text.append(f"### {title}\n\n{floor}")
        for file, caption in plots.draw(work, kind, title, members, docs / "benchmarks"):
            text.append(f"![{caption}](benchmarks/{file})\n")
        for group in groups_of(members).values():
            head = columns(group)
            if work == "hard":
                head = [name for name in head if name not in ("spread ms", "extra MiB", "share", group[0]["rate_unit"])]
            full = columns(group)
            table = [cells(rank, row, full) for rank, row in ranked(group)]
            keep = [full.index(name) for name in head]
            text.append(
                f"**{heading(group[0])}.** Ceiling {group[0]['ceiling']:.3g} {group[0]['rate_unit']}.\n\n"
                + markdown_table(head, ([line[i] for i in keep] for line in table))
                + "\n"
            )
    out = sorted(reasons(skipped).items())
    text.append("### Who did not take part\n")
    text.append(
        markdown_table(("implementation", "reason", "tests"), ((a, b, str(n)) for (a, b), n in out)) + "\n"
        if out
        else "None: all ran.\n"
    )
    return "\n".join(text)


INTRO = """# Benchmarks

Made by `python -m bench.report` from the result files named below; not edited by hand.

How to read the tables:

- **Time.** The rivals of one table run in turn, in one process, on the same numbers. A time is the median of the
  repetitions. The spread is the distance between their quartiles.
- **Memory** is the peak extra memory of one call above its inputs, results and gradients included. On a CPU it is the
  rise of the resident set's high-water mark.
- **Rate** counts the least work that any implementation must do. So an implementation that computes something twice has
  a lower rate.
- **Share** is the rate's share of a ceiling. The ceiling is measured in the same turns: a copy of device memory (read +
  write), or the head's own bare product. A share above 1 is a pass that only reads, where the copy it is measured
  against also writes.
- **Errors** are against float64, on the first rows of the same inputs. Log-probs and entropies are in nats. The error
  of a gradient is divided by its largest entry.
- **WRONG** stands where an error is more than twice that of plain torch in the same dtype, plus rounding. It is a
  statement about digits: the error and the budget stand beside it. The budget is in `bench/errors.py`.
- **Rank.** Three kinds of rows have none: those that are WRONG, those that compute no entropy where it is asked for,
  and those that approximate by design.

Adapters are in `bench/peers.py`. Some implementations need a CUDA device: flash-attn, quack, and the Triton kernels of
cut-cross-entropy, verl, Liger and TRL. Their adapters are written from the sources of TRL 1.16.0, liger-kernel 0.8.5,
cut-cross-entropy 25.1.1, verl 0.9.1, quack-kernels 0.6.5 and flash-attn 2.8.3. Where the GPU part below says "not
measured", they have not been run.

The whole step: `bench/step.py` writes out the authors' way, one candidate at a time, with full logits, and with one
scoring forward and one training forward each. Both sides take the same prompts, tokens and answer spans, and the same
AdamW step. Rollout is not part of it.
"""


def write(results: Sequence[Path], docs: Path) -> Path:
    """docs/benchmarks.md and its plots, from one result file of each kind of device."""
    parts = {}
    for path in results:
        kind = load(path)[0].facts["kind"]
        if kind in parts:
            raise SystemExit(f"{path}: a second result of kind {kind}; give one of each")
        parts[kind] = part(path, docs) + f"\nResult file: `bench/results/{path.name}`.\n"
    pages = [INTRO]
    missing = "not measured\n\n`bench/gpu.sh OUT_DIR [WHEEL_DIR]` measures it on a machine that has a GPU.\n"
    for kind, name in (("cuda", "GPU"), ("cpu", "CPU")):
        pages.append(f"## {name}\n\n" + parts.get(kind, missing))
    page = docs / "benchmarks.md"
    page.write_text("\n".join(pages).rstrip() + "\n")
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, help="result files, one of each kind of device")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder to write to")
    parser.add_argument("--text", action="store_true", help="print the tables to the terminal instead")
    args = parser.parse_args(arguments)
    if not args.results:
        parser.error("name at least one result file of `pytest bench/ --benchmark-json=FILE`")
    if args.text:
        for path in args.results:
            _, rows, skipped = load(path)
            print(text_tables(rows, skipped))
        return
    print(write(args.results, args.docs), file=sys.stderr)


if __name__ == "__main__":
    main()
