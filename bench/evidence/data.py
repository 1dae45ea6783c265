"""The problems of a task: given pairs, prompts for the model's own candidates, pairs that a run holds out by itself,
and held-out problems for the tables; all disjoint."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gem.config.settings import RowSettings, TrainConfig
from gem.data.answers import extract_answer
from gem.data.batches import TokenizedPair
from gem.data.pairs import PreferencePair, load_pairs, parse_pairs
from gem.data.prompts import TextFormat
from gem.data.sources import read_rows
from gem.demo.arithmetic import arithmetic_pairs
from gem.errors import UserError
from gem.files import write_jsonl

ARITHMETIC = "arithmetic"
# `held_out_seed` of the sizes, far from those of the runs: the held-out problems are the same for all of them.
HELD_OUT_SEED = 1_000_003
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class TaskData:
    """As tokens. `pool` gives its prompts alone; its answers only tell afterwards which winners were right."""

    given: list[TokenizedPair]
    pool: list[TokenizedPair]
    held_out: list[TokenizedPair]


def task_rows(task: str, seed: int, sizes: dict[str, int], marker: str = "Final Answer:") -> dict[str, Rows]:
    """Rows of "given", "pool", "validation" and "held_out". The held-out ones are the same for every seed.

    Of a file at most a third of the prompts is held out, and pairs of one prompt stay together. A row without a known
    answer takes the one that its chosen answer marks.
    """
    wanted = sizes["given_pairs"] + sizes["pool_prompts"]
    more = sizes["preference_pairs"]  # that a run of `gem train` holds out by itself
    if task == ARITHMETIC:
        held_out = arithmetic_pairs(sizes["problems"], sizes["held_out_seed"])
        taken = {row["prompt"] for row in held_out}
        others = arithmetic_pairs(wanted + more + len(held_out), seed)
        rest = [row for row in others if row["prompt"] not in taken][: wanted + more]
        return {
            "given": rest[: sizes["given_pairs"]],
            "pool": rest[sizes["given_pairs"] : wanted],
            "validation": rest[wanted:],
            "held_out": held_out,
        }
    groups: dict[Any, list[PreferencePair]] = {}
    for pair in file_pairs(task):
        groups.setdefault(pair.prompt, []).append(pair)
    prompts = list(groups)
    random.Random(sizes["held_out_seed"]).shuffle(prompts)
    num_held_out = min(sizes["problems"], len(prompts) // 3)
    held, rest = prompts[:num_held_out], prompts[num_held_out:]
    random.Random(seed).shuffle(rest)
    given: list[PreferencePair] = []
    while rest and len(given) < sizes["given_pairs"]:
        given += groups[rest.pop(0)]
    pool, validation = rest[: sizes["pool_prompts"]], rest[sizes["pool_prompts"] :][:more]
    if not held or not pool:
        raise UserError(
            f"{task}: {len(prompts)} prompts are too few for {sizes['given_pairs']} given pairs and others to test on; "
            "ask for fewer with --given-pairs"
        )
    return {
        "given": [as_row(pair, marker) for pair in given],
        "pool": [as_row(groups[prompt][0], marker) for prompt in pool],
        "validation": [as_row(groups[prompt][0], marker) for prompt in validation],
        "held_out": [as_row(groups[prompt][0], marker) for prompt in held],
    }


def file_pairs(task: str) -> list[PreferencePair]:
    """The good rows of the file; one that is malformed is an error."""
    pairs, problems = parse_pairs(read_rows(task), RowSettings())
    if bad := [problem for problem in problems if problem.kind == "bad"]:
        raise UserError(f"{task}: {bad[0].where}: {bad[0].what}")
    return pairs


def as_row(pair: PreferencePair, marker: str) -> dict[str, Any]:
    prompt = pair.prompt
    row = {
        "prompt": prompt if isinstance(prompt, str) else [{"role": role, "content": text} for role, text in prompt],
        "chosen": pair.chosen,
        "rejected": pair.rejected,
    }
    answer = pair.answer or extract_answer(pair.chosen, marker)
    return row if answer is None else {**row, "answer": answer}


def write_task(folder: Path, task: str, seed: int, sizes: dict[str, int]) -> dict[str, Path]:
    """The rows as files, where `gem train` and `load_task` find them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = task_rows(task, seed, sizes)
    rows["few"] = rows["held_out"][:2]  # a run of `gem train` evaluates something
    files = {name: folder / f"{name}.jsonl" for name in rows}
    for name, path in files.items():
        write_jsonl(path, rows[name])
    return files


def load_task(files: dict[str, Path], form: TextFormat, config: TrainConfig) -> TaskData:
    def load(name: str) -> list[TokenizedPair]:
        return load_pairs(files[name], form, None, config, room=config.max_completion_length)[0]

    return TaskData(load("given"), load("pool"), load("held_out"))
