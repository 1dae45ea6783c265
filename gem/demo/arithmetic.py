"""Arithmetic word problems with a right and a plausible wrong worked answer: preference pairs with no foreign data.

A problem is a story of one to three steps. The wrong chain makes one slip (another operation, a sum that is off, or a
missed step) and then carries on faithfully, so that it reads as well as the right one and only its numbers are wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gem.errors import UserError, short

NAMES = (
    "Ada", "Ben", "Chen", "Dora", "Eli", "Fatima", "Goran", "Hana", "Ivan", "Jun", "Kofi", "Lena", "Mira", "Nils",
    "Omar", "Priya", "Quinn", "Rosa", "Sven", "Tara", "Uma", "Viktor", "Wanda", "Yara", "Zeno",
)  # fmt: skip
ITEMS = (
    "apples", "books", "cards", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "stickers", "beads",
    "buttons", "cookies", "candles", "tickets", "balloons",
)  # fmt: skip
MOST_PAIRS = 1_000_000
BOXES = ("bags", "boxes", "jars", "baskets", "drawers", "trays")
FRIENDS = ("friends", "cousins", "neighbours", "classmates")
_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b,
}
# The operation a hurried reader takes instead.
_CONFUSED = {"+": "-", "-": "+", "*": "+", "/": "-"}


@dataclass(frozen=True)
class Step:
    """One line of a worked answer: "`says` value `operation` `operand` = result.", from the value before it."""

    operation: str
    operand: int
    says: str


@dataclass(frozen=True)
class Problem:
    question: str
    start: int
    steps: tuple[Step, ...]

    def values(self) -> list[int]:
        """The value after each step; the last is the answer."""
        values = [self.start]
        for step in self.steps:
            values.append(_OPERATIONS[step.operation](values[-1], step.operand))
        return values[1:]


def arithmetic_pairs(num_pairs: int, seed: int = 0, marker: str = "Final Answer:") -> list[dict[str, str]]:
    """`num_pairs` different problems as {"prompt", "chosen", "rejected", "answer"}, the same for the same seed.

    The first n of a longer list are the shorter list, so one list split in two gives disjoint train and held-out sets.
    """
    if num_pairs < 1:
        raise UserError(f"pairs: expected at least 1, got {num_pairs}")
    if num_pairs > MOST_PAIRS:
        raise UserError(f"--pairs: expected at most {MOST_PAIRS:,}, got {short(num_pairs)}; there are not many more")
    pairs: list[dict[str, str]] = []
    seen: set[str] = set()
    for problem, rng in _problems(seed):
        if len(pairs) == num_pairs:
            break
        if problem.question in seen:
            continue
        seen.add(problem.question)
        pairs.append(_pair(problem, rng, marker))
    return pairs


def _problems(seed: int) -> Iterator[tuple[Problem, random.Random]]:
    """Problems of one, two, three, one, ... steps, without end."""
    rng = random.Random(seed)
    num_steps = 0
    while True:
        yield _problem(rng, 1 + num_steps % 3), rng
        num_steps += 1


def _problem(rng: random.Random, num_steps: int) -> Problem:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    if rng.random() < 0.5:
        start = rng.randint(6, 60)
        opening = rng.choice((f"{name} has {start} {item}.", f"{name} starts the day with {start} {item}."))
        steps: list[Step] = []
    else:
        start, each = rng.randint(2, 9), rng.randint(2, 9)
        box = rng.choice(BOXES)
        opening = f"{name} has {start} {box} with {each} {item} in each."
        steps = [Step("*", each, f"{name} begins with")]
    sentences, value = [opening], steps[0].operand * start if steps else start
    previous = ""
    while len(steps) < num_steps:
        last = len(steps) == num_steps - 1
        step, sentence = _next_step(rng, name, item, value, previous, last)
        steps.append(step)
        sentences.append(sentence)
        value = _OPERATIONS[step.operation](value, step.operand)
        previous = step.operation
    # A sharing step asks its own question; every other story ends with the same one.
    if steps[-1].operation == "/":
        question = f"How many {item} does each of them get?"
    else:
        question = f"How many {item} does {name} have {rng.choice(('now', 'in the end'))}?"
    return Problem(" ".join([*sentences, question]), start, tuple(steps))


def _next_step(rng: random.Random, name: str, item: str, value: int, previous: str, last: bool) -> tuple[Step, str]:
    """A step that follows from `value` with a whole, positive result, and the sentence that tells it."""
    divisors = [d for d in range(2, 10) if value % d == 0 and value > d]
    choices = ["+", "-"] if value > 2 else ["+"]
    if value <= 60 and previous != "*":
        choices.append("*")
    if divisors and last:
        choices += ["/", "/"]
    operation = rng.choice([c for c in choices if c != previous] or choices)
    other = rng.choice([n for n in NAMES if n != name])
    if operation == "+":
        amount = rng.randint(2, 50)
        sentence = rng.choice((f"{other} gives {name} {amount} more.", f"{name} buys {amount} more {item}."))
        return Step("+", amount, f"After getting {amount} more there are"), sentence
    if operation == "-":
        amount = rng.randint(1, value - 1)
        sentence = rng.choice((f"{name} gives {amount} to {other}.", f"{name} loses {amount} of them."))
        return Step("-", amount, f"After {amount} are gone there are"), sentence
    if operation == "*":
        amount = rng.randint(2, 5)
        word = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}[amount]
        sentence = f"Then {name} collects until there are {word} as many."
        return Step("*", amount, f"{word.capitalize()} as many makes"), sentence
    amount = rng.choice(divisors)
    sentence = f"{name} shares them equally among {amount} {rng.choice(FRIENDS)}."
    return Step("/", amount, f"Shared among {amount}, each gets"), sentence


def _pair(problem: Problem, rng: random.Random, marker: str) -> dict[str, str]:
    right, answer = _chain(problem, marker)
    slips = [(at, slip) for at in range(len(problem.steps)) for slip in ("operation", "sum", "missed step")]
    rng.shuffle(slips)
    # A slip can cancel out (2 + 2 for 2 * 2), end below zero or in a fraction: then another. A sum that is too large
    # in the last step always serves.
    for at, slip in slips:
        slipped = _slipped_chain(problem, at, slip, rng, marker)
        if slipped is not None and slipped[1] != answer:
            return {"prompt": problem.question, "chosen": right, "rejected": slipped[0], "answer": str(answer)}
    raise AssertionError(f"no wrong chain for {problem}")


def _chain(problem: Problem, marker: str) -> tuple[str, int]:
    lines, value = [], problem.start
    for step in problem.steps:
        result = _OPERATIONS[step.operation](value, step.operand)
        lines.append(_line(step.says, value, step.operation, step.operand, result))
        value = result
    return "\n".join([*lines, f"{marker} {value}"]), value


def _slipped_chain(problem: Problem, at: int, slip: str, rng: random.Random, marker: str) -> tuple[str, int] | None:
    """The worked answer with one slip at step `at`, carried through to the end; None where it gives no whole number."""
    lines, value = [], problem.start
    for i, step in enumerate(problem.steps):
        operation = step.operation
        if i == at and slip == "missed step":
            if len(problem.steps) == 1:
                return None
            continue
        if i == at and slip == "operation":
            operation = _CONFUSED[operation]
        if operation == "/" and value % step.operand:
            return None
        result = _OPERATIONS[operation](value, step.operand)
        if i == at and slip == "sum":
            result += rng.choice([d for d in (-10, -2, -1, 1, 2, 10) if result + d > 0])
        if result <= 0:
            return None
        lines.append(_line(step.says, value, operation, step.operand, result))
        value = result
    return "\n".join([*lines, f"{marker} {value}"]), value


def _line(says: str, value: int, operation: str, operand: int, result: int) -> str:
    return f"{says} {value} {operation} {operand} = {result}."
