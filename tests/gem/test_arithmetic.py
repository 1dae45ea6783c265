"""Arithmetic pairs: the right chain is right, the wrong one is consistent but wrong, and the seed decides all."""

import re
from itertools import pairwise

import pytest

from gem.data.answers import answers_match, extract_answer
from gem.demo.arithmetic import arithmetic_pairs
from gem.errors import UserError

PAIRS = arithmetic_pairs(5000, seed=3)
LINE = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.$")


def results(text):
    return [(int(a), op, int(b), int(c)) for a, op, b, c in (LINE.search(x).groups() for x in text.split("\n")[:-1])]


def holds(a, op, b, c):
    return {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": b * c == a}[op]


def test_right_chains_are_right_and_end_in_the_answer():
    for pair in PAIRS:
        lines = results(pair["chosen"])
        assert 1 <= len(lines) <= 3
        assert all(holds(*line) for line in lines)
        assert all(before[3] == after[0] for before, after in pairwise(lines))
        assert lines[-1][3] == int(pair["answer"])
        assert extract_answer(pair["chosen"], "Final Answer:") == pair["answer"]


def test_wrong_chains_carry_one_slip_to_a_wrong_answer():
    kinds = {"operation": 0, "sum": 0, "missed step": 0}
    for pair in PAIRS:
        right, wrong = results(pair["chosen"]), results(pair["rejected"])
        assert not answers_match(extract_answer(pair["rejected"], "Final Answer:"), pair["answer"])
        assert wrong[-1][3] == int(extract_answer(pair["rejected"], "Final Answer:"))
        assert all(before[3] == after[0] for before, after in pairwise(wrong))
        broken = sum(not holds(*line) for line in wrong)
        if len(wrong) < len(right):
            kind = "missed step"
            assert broken == 0 and len(wrong) == len(right) - 1
        elif broken:
            kind = "sum"
            assert broken == 1
        else:
            kind = "operation"
            assert sum(a[1] != b[1] for a, b in zip(right, wrong)) == 1
        kinds[kind] += 1
    assert min(kinds.values()) > len(PAIRS) / 10


def test_the_seed_decides_and_a_longer_list_begins_with_the_shorter():
    assert arithmetic_pairs(5000, seed=3) == PAIRS
    assert arithmetic_pairs(50, seed=3) == PAIRS[:50]
    assert arithmetic_pairs(50, seed=4) != PAIRS[:50]
    assert len({pair["prompt"] for pair in PAIRS}) == len(PAIRS)


def test_at_least_one_pair():
    with pytest.raises(UserError, match="at least 1"):
        arithmetic_pairs(0)
