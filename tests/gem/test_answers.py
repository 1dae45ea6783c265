"""Answer spans: token indices from the sampler's own ids, byte-level BPE with partial characters included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gem.data.answers import (
    answer_finders,
    answers_match,
    explicit_answer,
    extract_answer,
    find_answer_spans,
    normalize_answer,
)
from gem.data.batches import pad_rows
from gem.errors import UserError
from tests.helpers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id


def bytes_of(text):
    """One token a byte: the tokenization a sampler may well emit and a tokenizer never would."""
    symbols = [TOKENIZER.convert_ids_to_tokens(TOKENIZER.encode(c)) for c in text]
    return [TOKENIZER.convert_tokens_to_ids(s) for symbol in symbols for token in symbol for s in token]


def spans_of(rows, marker="Final Answer:"):
    return find_answer_spans(TOKENIZER, *pad_rows(rows, 0, left=False), marker, [END])


@pytest.mark.parametrize(
    ("before", "between", "answer"),
    [
        ("So 2 + 2 = 4.\nFinal Answer:", " ", "4"),
        ("Final Answer:", "", "4"),
        ("Final Answer: 3? No.\nFinal Answer:", "\n ", "12 apples"),
        ("é漢🙂 Final Answer:", " ", "🙂 yes"),
        ("Final Answer:", "", "漢字"),
    ],
)
@pytest.mark.parametrize("end", [[], [END]])
def test_the_answer_starts_at_its_first_byte(before, between, answer, end):
    row = bytes_of(before + between + answer) + end
    spans = spans_of([row])
    assert spans.found.tolist() == [True]
    assert spans.answer_start.tolist() == [len(bytes_of(before + between))]
    assert spans.answers == (answer,)


def test_a_token_across_the_boundary_belongs_to_the_answer():
    token = TOKENIZER.convert_tokens_to_ids(":Ġ4")
    row = [*bytes_of("Final Answer"), token, *bytes_of("2")]
    assert TOKENIZER.decode(row) == "Final Answer: 42"
    assert spans_of([row]).answer_start.tolist() == [len("Final Answer")]


def test_no_marker_and_nothing_after_it_are_misses():
    rows = [bytes_of("just 4"), [*bytes_of("Final Answer: \n"), END], [END], bytes_of("Final Answer: 4")]
    spans = spans_of(rows)
    assert spans.found.tolist() == [False, False, False, True]
    assert spans.answer_start.tolist()[:3] == [len(row) for row in rows[:3]]  # the length: "no answer"
    assert spans.answers == (None, None, None, "4")
    assert spans.hit_rate == 0.25


def test_the_marker_is_configurable():
    assert spans_of([bytes_of("#### 7")], "####").answer_start.tolist() == [5]


@pytest.mark.parametrize(
    ("finder", "text", "before", "answer"),
    [
        ("boxed", r"So \boxed{3}, no: \boxed{\frac{1}{2}}.", r"So \boxed{3}, no: \boxed{", r"\frac{1}{2}"),
        ("boxed", r"$\boxed { 4 }$", r"$\boxed { ", "4"),
        ("boxed", r"\fbox{a \} b} end", r"\fbox{", r"a \} b"),
        ("boxed", r"\boxed{7} and then \boxed{8", r"\boxed{", "7"),
        ("boxed", r"\boxed{7", None, None),
        ("boxed", r"\boxed{ } nothing", None, None),
        ("answer_tag", "<answer>1</answer> b <answer>\n漢 2\nx</answer>", "<answer>1</answer> b <answer>\n", "漢 2"),
        ("answer_tag", "<answer>never closed", None, None),
        ("answer_tag", "</answer> first", None, None),
        ("after_think", "<think>2 + 2</think>\n\nIt is 4.\nYes.", "<think>2 + 2</think>\n\n", "It is 4."),
        ("after_think", "<think>never done", None, None),
        ("after_think", "<think>x</think> \n", None, None),
        ("last_sentence", 'He said "no." It is 3.5 kg.  ', 'He said "no." ', "It is 3.5 kg."),
        ("last_sentence", "one line\nthe last\n\n", "one line\n", "the last"),
        ("last_sentence", "一。二", "一。", "二"),
        ("last_sentence", "only one", "", "only one"),
        ("last_sentence", " \n", None, None),
        ("last_tokens:3", "abcdef", "abc", "def"),
        ("last_tokens:30", "abcdef", "", "abcdef"),
        ("last_tokens:2", "  ", None, None),
        (r"regex:= *(\d+)", "1 = 1, 2 =  22.", "1 = 1, 2 =  ", "22"),
        (r"regex:\d+", "10 and 20", "10 and ", "20"),
        (r"regex:(a)?b", "ab b", "", "a"),
        (r"regex:x*", "none", None, None),
    ],
)
@pytest.mark.parametrize("end", [[], [END]])
def test_every_finder(finder, text, before, answer, end):
    row = bytes_of(text) + end
    spans = find_answer_spans(TOKENIZER, *pad_rows([row], 0, left=False), answer_finders([finder]), [END])
    assert spans.answers == (answer,)
    assert spans.answer_start.tolist() == [len(row) if answer is None else len(bytes_of(before))]
    assert spans.found_by.tolist() == [-1 if answer is None else 0]


def test_finders_are_tried_in_order_and_counted():
    rows = [bytes_of(t) for t in (r"\boxed{1} Final Answer: 2", "Final Answer: 3", "It is 4", "<answer>5</answer>", "")]
    names = ("boxed", "marker", "answer_tag", "last_tokens:1")
    spans = find_answer_spans(TOKENIZER, *pad_rows(rows, 0, left=False), answer_finders(names), [END])
    assert spans.answers == ("1", "3", "4", "5", None)
    assert spans.found_by.tolist() == [0, 1, 3, 2, -1]
    assert spans.hit_rates == {"boxed": 0.2, "marker": 0.2, "answer_tag": 0.2, "last_tokens:1": 0.2}
    assert sum(spans.hit_rates.values()) == pytest.approx(spans.hit_rate)


@pytest.mark.parametrize(
    ("names", "word"),
    [(["box"], "box"), (["last_tokens:0"], ":0'"), (["last_tokens:x"], ":x'"), (["regex:("], "regular"), ([], "none")],
)
def test_a_wrong_finder_is_named(names, word):
    with pytest.raises(UserError, match="answer_span") as error:
        answer_finders(names)
    assert word in str(error.value)


def test_position_alone_is_no_explicit_answer():
    finders = answer_finders(["last_tokens:2", "last_sentence", "boxed"])
    assert explicit_answer("It is 4.", finders) is None
    assert explicit_answer(r"It is \boxed{4}. Yes.", finders) == "4"


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(
        st.tuples(
            st.text(max_size=12), st.text("éü漢🙂a1 \n", max_size=6), st.text("éü漢🙂a1", min_size=1, max_size=6)
        ),
        min_size=1,
        max_size=4,
    ),
    data=st.data(),
)
def test_spans_split_the_bytes_where_the_text_splits(texts, data):
    """Random text, one token a byte or with merges: the first token of the span holds the answer's first byte."""
    rows, places = [], []
    for before, space, answer in texts:
        text = f"{before}Final Answer:{space}{answer}"
        raw = text.encode()
        row = bytes_of(text)
        # Where the tokenizer has a merge, use it or not, at random.
        if data.draw(st.booleans()):
            row = TOKENIZER.encode(text)
        rows.append(row)
        rest = text[text.rfind("Final Answer:") + len("Final Answer:") :]
        places.append(len(raw) - len(rest.lstrip().encode()))
    spans = spans_of(rows)
    for row, place, start in zip(rows, places, spans.answer_start.tolist()):
        ends = torch.tensor([len(t) for t in TOKENIZER.convert_ids_to_tokens(row)]).cumsum(0).tolist()
        begin = ends[start - 1] if start else 0
        assert begin <= place < ends[start]  # the span's first token holds the answer's first byte


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("$1,200.00.", "1200"), ("1200 dollars", "1200"), ("x = 7", "7"), ("42km", "42"), ("-$5", "-5"),
        ("0.50", "0.5"), ("-0", "0"), ("**18**", "18"), ("5/8", "5/8"), ("2 h  30 min", "2 h 30 min"),
        ("A1", "a1"), ("Paris.", "paris"), ("100", "100"), ("+3", "3"),
    ],
)  # fmt: skip
def test_normalized_answers(text, normal):
    assert normalize_answer(text) == normal


def test_matching():
    assert answers_match("$42.00", "42") and answers_match("42 apples.", "42")
    assert not answers_match("41", "42") and not answers_match(None, "42")
    assert not answers_match("5/8", "5") and not answers_match("420", "42")
    assert extract_answer("Final Answer: 3\nFinal Answer: 4\nmore", "Final Answer:") == "4"
    assert extract_answer("four", "Final Answer:") is None
