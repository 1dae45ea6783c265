"""A run's files as the training loop, `gem score` and `gem calibrate` write them, with made-up numbers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

ALTERNATIVES = (" the", " so", " each", " 12", " then", "\n", " and", " gives", " total")
WORDS = (
    "Ada",
    "has",
    "12",
    "bags",
    "of",
    "7",
    "apples",
    "and",
    "gives",
    "5",
    "away",
    ".",
    "So",
    "the",
    "total",
    "is",
    "=",
)
HOSTILE = (
    "<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "\"'`&amp;", "{{7*7}}{% raw %}${1+1}",
    "\u202eesrever\u202c", "\x00\x07\x1b[31m", "👩‍👩‍👧 🎉", "שלום עולם",
    "<!--", "\u2028\u2029", "\ud800", "\r\n", "javascript:alert(1)",
)  # fmt: skip


def completion_row(
    prompt_index: int = 0, candidate: int = 0, tokens: list[str] | None = None, seed: int = 0, **more: Any
) -> dict[str, Any]:
    """A row with tokens: most certain, a few not, and the last three the answer."""
    draw = random.Random(seed * 10_007 + prompt_index * 101 + candidate)
    if tokens is None:
        length = draw.randint(14, 60)
        tokens = [" " + draw.choice(WORDS) if i % 9 else "\n" + draw.choice(WORDS) for i in range(length)]
        tokens += ["\nFinal", " Answer", ":", " 7", "9" if candidate % 2 == 0 else "8"]
    entropy = [round(draw.expovariate(12) if draw.random() < 0.8 else draw.uniform(0.3, 4.5), 6) for _ in tokens]
    logprob = [-round(draw.expovariate(1 / (h + 1e-3)), 6) for h in entropy]
    start = len(tokens) - 2
    order = sorted(range(start), key=lambda i: -entropy[i])
    forks = set(order[: max(1, start // 10)])
    top = [
        [[token, value], *[[other, value - 0.7 * k - 0.5] for k, other in enumerate(draw.sample(ALTERNATIVES, 4), 1)]]
        for token, value in zip(tokens, logprob)
    ]
    score = -sum(entropy[start:]) / 2 + sum(entropy[i] for i in forks) / len(forks)
    row = {
        "prompt": f"You solve problems.\n\nQuestion: Ada has {prompt_index + 3} bags of 7 apples. How many?\nAnswer:\n",
        "prompt_index": prompt_index,
        "candidate": candidate,
        "completion": "".join(tokens),
        "tokens": tokens,
        "entropy": entropy,
        "logprob": logprob,
        "top": top,
        "answer_start": start,
        "fork": [i in forks for i in range(len(tokens))],
        "score": score,
        "features": {"h_final": entropy[-1], "mean_logprob": sum(logprob) / len(tokens), "length": len(tokens)},
        "probability": 1 / (1 + math.exp(-score)),
        "advantage": draw.gauss(0, 1),
        "correct": candidate % 2 == 0,
        "valid": True,
    }
    return {**row, **more}


def hostile_rows(num_tokens: int = 50_000) -> list[dict[str, Any]]:
    """Everything that could end a script, turn text around or make a page slow, in every text of a row."""
    short = completion_row(tokens=[*HOSTILE, " so", " 4"], prompt=f"{HOSTILE[1]}{HOSTILE[3]}{HOSTILE[4]}")
    short["features"] = {HOSTILE[0]: 1.0}
    plain = {
        "prompt": short["prompt"],
        "prompt_index": 0,
        "completion": "".join(HOSTILE),
        "answer": HOSTILE[1],
        "score": 0,
    }
    tokens = [HOSTILE[i % len(HOSTILE)] if i % 50 == 0 else f" w{i}" for i in range(num_tokens)]
    return [short, plain, completion_row(1, 0, tokens, prompt=short["prompt"] + "again")]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def calibrated_score() -> dict[str, Any]:
    def estimate(value: float, spread: float, count: int = 48) -> dict[str, float]:
        return {"value": value, "low": max(0, value - spread), "high": min(1, value + spread), "count": count}

    bins = [(31, 0.08, 0.06), (60, 0.21, 0.25), (74, 0.38, 0.33), (48, 0.55, 0.6), (29, 0.72, 0.69), (14, 0.9, 0.93)]
    steps = [i / 20 for i in range(21)]
    return {
        "kind": "gem-score",
        "version": 1,
        "features": ["h_final", "h_fork", "mean_logprob", "length"],
        "weights": {"h_final": -0.41, "h_fork": -0.18, "mean_logprob": 1.32, "length": 0.05},
        "weight_intervals": {
            "h_final": [-0.9, 0.02], "h_fork": [-0.51, 0.2], "mean_logprob": [0.7, 1.9], "length": [-0.3, 0.4],
        },
        "scales": {"h_final": 0.031, "h_fork": 0.62, "mean_logprob": 0.118, "length": 14.2},
        "intercept": 0.0123,
        "l2": 1.0,
        "model": "SmolLM2-135M-Instruct",
        "pairs_hash": "b1946ac92492d2347c6235b4d2611184",
        "num_pairs": 48,
        "num_prompts": 48,
        "verdict": {
            "kind": "informative",
            "words": "The calibrated score prefers the chosen answer in 0.854 of the pairs left out (95 % interval "
            "[0.728, 0.928]); length alone in 0.542. Trust it to choose among samples.",
        },
        "pair_accuracy": {
            "paper": estimate(0.52, 0.14), "length": estimate(0.542, 0.14), "mean_logprob": estimate(0.81, 0.11),
            "h_final": estimate(0.604, 0.13), "h_fork": estimate(0.396, 0.13), "calibrated": estimate(0.854, 0.1),
        },
        "samples": {
            "auroc_within": {"paper": estimate(0.52, 0.07, 512), "calibrated": estimate(0.77, 0.05, 512)},
            "auroc_over": {"paper": estimate(0.16, 0.06, 512), "calibrated": estimate(0.74, 0.06, 512)},
            "best_of": {"paper": estimate(0.203, 0.1, 64), "calibrated": estimate(0.391, 0.12, 64)},
            "single": estimate(0.285, 0.086, 512),
            "majority": estimate(0.344, 0.12, 64),
            "any": estimate(0.594, 0.12, 64),
            "roc_within": {"false_positive": steps, "true_positive": [x**0.35 for x in steps]},
            "reliability": [{"count": n, "confidence": c, "share_right": r} for n, c, r in bins],
        },
    }  # fmt: skip


def metric_rows(sft_steps: int = 12, sega_steps: int = 24, guards: tuple[int, ...] = (9, 17)) -> list[dict[str, Any]]:
    draw = random.Random(4)

    def evaluation(after: str, accuracy: float) -> dict[str, Any]:
        row: dict[str, Any] = {"stage": "eval", "after": after, "eval/preference_num_pairs": 64, "eval/seconds": 31.0}
        for key, value in (
            ("preference", 0.5 + accuracy), ("answer", accuracy + 0.02), ("sampled_accuracy", accuracy),
            ("best_score_accuracy", accuracy + 0.08), ("majority_accuracy", accuracy + 0.05),
            ("score_auroc_within", 0.5 + accuracy / 2), ("calibration_error", 0.21 - accuracy / 3),
        ):  # fmt: skip
            name = f"{key}_accuracy" if key in ("preference", "answer") else key
            row |= {f"eval/{name}": value, f"eval/{key}_low": value - 0.08, f"eval/{key}_high": value + 0.08}
        return row | {"eval/gem/h_final": 0.03, "eval/gem/h_fork": 1.3 + accuracy, "eval/gem/mean_length": 44.5}

    rows = [evaluation("start", 0.121)]
    for step in range(1, sft_steps + 1):
        rows.append({"stage": "SFT", "step": step, "loss": 2 / step**0.8 + draw.uniform(0, 0.1), "grad_norm": 9 / step,
                     "learning_rate": 1e-4 * (1 - step / 20), "num_tokens": 180, "step_time": 3.1})  # fmt: skip
    rows.append(evaluation("SFT", 0.285))
    for step in range(1, sega_steps + 1):
        x = step / sega_steps
        rows.append({
            "stage": "SEGA", "step": step, "loss": draw.gauss(0, 0.3), "grad_norm": draw.uniform(2, 5),
            "learning_rate": 1e-5, "reward": 1.1 + x + draw.gauss(0, 0.1), "gem/score": 1.1 + x + draw.gauss(0, 0.1),
            "entropy": 0.22 + 0.1 * x, "gem/h_final": 0.03 * math.exp(-2 * x), "gem/h_fork": 1.3 + 0.9 * x,
            "kl": 0.02 * step / 3 + draw.uniform(0, 0.01), "completions/mean_length": 44 + 20 * x + draw.gauss(0, 2),
            "completions/min_length": 20, "completions/max_length": 80, "completions/clipped_ratio": 0.1 + 0.3 * x,
            "gem/answer_span_found": 0.95 - 0.3 * x, "gem/fork_repetition": 0.05 + 0.2 * x, "gem/valid": 0.97,
            "frac_reward_zero_std": 0.0, "gem/pairs_decided": 0.5 + draw.gauss(0, 0.1), "step_time": 21.0,
        })  # fmt: skip
        if step in guards:
            rows.append({"stage": "guard", "step": step, "guards": ["h_final"], "action": "lower_fork_weight",
                         "done": f"fork_weight is now {0.5 if step == guards[0] else 0.25}"})  # fmt: skip
        if step == sega_steps // 2:
            rows.append(evaluation(f"SEGA {step}", 0.292))
    return [*rows, evaluation("SEGA", 0.305)]


def make_run(path: Path, num_prompts: int = 4, candidates: int = 4, steps: tuple[int, ...] = (1, 12, 24)) -> Path:
    """A run's directory with all that the page can show."""
    path.mkdir(parents=True)
    write_rows(path / "metrics.jsonl", metric_rows())
    rows = [
        completion_row(p, c, seed=step, stage="SEGA", step=step)
        for step in steps
        for p in range(num_prompts)
        for c in range(candidates)
    ]
    write_rows(path / "completions.jsonl", rows)
    (path / "score.json").write_text(json.dumps(calibrated_score()))
    (path / "config.yaml").write_text(
        "model: HuggingFaceTB/SmolLM2-135M-Instruct\nguards: lower_fork_weight\nseed: 0\n"
    )
    return path
