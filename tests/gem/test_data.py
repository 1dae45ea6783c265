"""Reading pairs: every kind of bad line is one error with file, line and remedy; prompts, splits and padding."""

import dataclasses
import json
import types

import pytest
import torch

from gem.config.read import build_config
from gem.config.settings import DIRECT_SYSTEM_PROMPT, RowSettings, TextSettings
from gem.config.use import CalibrateSettings, EvaluateSettings, ScoreSettings
from gem.data import sources
from gem.data.answers import answer_finders
from gem.data.batches import collate
from gem.data.pairs import load_pairs, load_run_pairs, sft_target, split_pairs
from gem.data.prompts import text_format
from gem.data.sources import RowReport, read_rows
from gem.errors import UserError
from tests.helpers import tiny_tokenizer

GOOD = {"prompt": "1 + 1?", "chosen": "Final Answer: 2", "rejected": "Final Answer: 3"}


FORM = text_format(tiny_tokenizer(), TextSettings(system_prompt=""))
SKIP = {"bad_rows": "skip", "duplicate_rows": "skip", "overlong_rows": "skip"}


def load(path, context=None, split="train", *, room=0, **settings):
    return load_pairs(path, FORM, context, RowSettings(**settings), split, room=room)


def form_with(finders, marker="Final Answer:", chain_of_thought=True):
    return dataclasses.replace(
        FORM, finders=answer_finders(finders, marker), marker=marker, chain_of_thought=chain_of_thought
    )


def text(ids):
    return FORM.tokenizer.decode(ids)


def write(path, *lines):
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": "a", ', ["not valid JSON", "one complete JSON object per line"]),
        (b"\xff\xfe{}", ["UTF-8"]),
        ([1, 2], ["JSON object is expected", "list"]),
        ({"prompt": "a", "chosen": "b"}, ['"rejected" is missing', '"prompt", "chosen" and "rejected"']),
        ({**GOOD, "chosen": "  "}, ['"chosen" is empty', "delete this line"]),
        ({**GOOD, "chosen": "\ud83d"}, ['"chosen" holds half a character']),
        ({**GOOD, "rejected": 3}, ['"rejected" must be text', "int"]),
        ({**GOOD, "rejected": GOOD["chosen"]}, ["same text"]),
        ({**GOOD, "answer": ""}, ['"answer" is empty']),
        ({**GOOD, "answer": [1]}, ['"answer" must be', "list"]),
        ({**GOOD, "prompt": None}, ['"prompt" is empty']),
        ({**GOOD, "prompt": []}, ['"prompt" is empty']),
        ({**GOOD, "prompt": [{"role": "user"}]}, ['"prompt" must be text or a list of messages']),
        ({**GOOD, "prompt": [{"role": "robot", "content": "x"}]}, ['"prompt" has a message of role', "'robot'"]),
        ({**GOOD, "prompt": [{"role": "user", "content": " "}]}, ['"prompt: content" is empty']),
        ({**GOOD, "prompt": [{"role": "assistant", "content": "x"}]}, ["must end with a message of the user"]),
        ({**GOOD, "chosen": [{"role": "assistant", "content": "x"}]}, ["must all be text or all be messages"]),
        (
            {"prompt": "q", **{k: [{"role": r, "content": k}] for k, r in (("chosen", "user"), ("rejected", "user"))}},
            ['"chosen" must be one message of the assistant'],
        ),
    ],
)
def test_a_bad_line_is_one_error_with_file_line_and_remedy(tmp_path, line, words):
    path = write(tmp_path / "pairs.jsonl", GOOD, b"", line, {**GOOD, "prompt": "2 + 2?"})
    with pytest.raises(UserError) as error:
        load(path)
    message = str(error.value)
    assert message.startswith(f"{path}:3: ") and "\n" not in message
    for word in words:
        assert word in message


def test_all_bad_rows_are_in_one_report(tmp_path):
    """Malformed, duplicate and overlong rows together, in the order of the file, each with its line."""
    other = {**GOOD, "prompt": "1 + 2?"}
    path = write(tmp_path / "pairs.jsonl", b"{", GOOD, {**GOOD, "prompt": "x" * 300}, b"[", GOOD, other)
    with pytest.raises(UserError) as error:
        load(path, 256, duplicate_rows="error")
    first, *listed = str(error.value).split("\n")
    assert first.startswith(f"{path}: 4 of 6 rows cannot be used; correct them, or set")
    assert "bad_rows: skip, overlong_rows: skip, duplicate_rows: skip" in first
    assert [line.split(":")[1] for line in listed] == ["1", "3", "4", "5"]
    assert f"the same pair stands at {path}:2" in listed[3] and "more than the model's context of 256" in listed[1]
    # The policy of each kind is its own.
    with pytest.raises(UserError, match=r"2 of 6 rows cannot be used; correct them, or set bad_rows: skip\n"):
        load(path, 256, **{**SKIP, "bad_rows": "error"})
    pairs, report = load(path, 256, **SKIP)
    assert len(pairs) == 2 and report.counts() == {"bad": 2, "duplicate": 1, "overlong": 1}
    assert str(report).startswith(f"{path}: left out 4 of 6 rows (2 bad, 1 duplicate, 1 overlong)")
    assert f"the first: {path}:1: not valid JSON" in str(report)
    pairs, report = load(path, 512, bad_rows="skip", duplicate_rows="keep")
    assert len(pairs) == 4 and report.counts() == {"bad": 2}


def test_a_report_names_what_the_command_takes(tmp_path):
    """gem train has settings, the other commands a flag, Python an argument."""
    path = write(tmp_path / "pairs.jsonl", b"{", b"[")
    for settings in (ScoreSettings(), EvaluateSettings(), CalibrateSettings()):
        words = r"correct them, or leave them out with --skip-bad \(Python: bad_rows=\"skip\"\)\n"
        with pytest.raises(UserError, match=words):
            load_pairs(path, FORM, 512, settings)


def test_a_long_report_is_cut_and_says_so(tmp_path):
    path = write(tmp_path / "pairs.jsonl", *[b"{"] * 60)
    with pytest.raises(UserError) as error:
        load(path)
    assert str(error.value).count("\n") == 51 and str(error.value).endswith("... and 10 more")


def test_no_pairs_and_no_file(tmp_path):
    with pytest.raises(UserError, match="no pairs"):
        load(write(tmp_path / "empty.jsonl", b""))
    with pytest.raises(UserError, match=r"no pairs .* left out 1 of 1 rows"):
        load(write(tmp_path / "bad.jsonl", b"{"), **SKIP)
    with pytest.raises(UserError, match="cannot read"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        load("none.jsonl")


def test_room_for_sampled_answers_counts(tmp_path):
    path = write(tmp_path / "p.jsonl", GOOD)
    length = len(load(path)[0][0].prompt_ids)
    assert load(path, length + 100, room=100)
    with pytest.raises(UserError, match=rf"p\.jsonl:1: the prompt has {length} tokens .* need up to 101"):
        load(path, length + 100, room=101)


def test_answer_may_be_a_number(tmp_path):
    for given, known in ((2, "2"), (2.5, "2.5"), (float("nan"), None), (None, None), ("two", "two")):
        assert load(write(tmp_path / "p.jsonl", {**GOOD, "answer": given}))[0][0].answer == known


def test_columns_are_mapped(tmp_path):
    row = {"question": "1 + 1?", "good": "2", "worse": "3", "label": 2, "answer": [0]}
    path = write(tmp_path / "p.jsonl", row)
    columns = {"prompt": "question", "chosen": "good", "rejected": "worse", "answer": "label"}
    names = {f"{key}_column": name for key, name in columns.items()}
    assert load(path, **names)[0][0].answer == "2"
    with pytest.raises(UserError, match=r'"good" is missing.*"question", "good" and "worse".*--prompt-column'):
        load(write(tmp_path / "q.jsonl", GOOD), **names)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


TURNS = [user("Hi"), assistant("Hello"), user("1 + 1?")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TURNS, "chosen": [assistant("2")], "rejected": [assistant("3")]},
        {"prompt": TURNS, "chosen": "2", "rejected": "3"},
        {"chosen": [*TURNS, assistant("2")], "rejected": [*TURNS, assistant("3")]},
        {"prompt": TURNS, "chosen": [*TURNS, assistant("2")], "rejected": [*TURNS, assistant("3")]},
        {"prompt": "1 + 1?", "chosen": [*TURNS, assistant("2")], "rejected": [*TURNS, assistant("3")]},
    ],
)
def test_chat_messages_in_every_form_are_one_pair(tmp_path, row):
    pair = load(write(tmp_path / "p.jsonl", row))[0][0]
    assert text(pair.prompt_ids) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text(pair.chosen_ids) == "2<|im_end|>" and text(pair.rejected_ids) == "3<|im_end|>"


def test_messages_that_contradict_the_prompt_are_bad(tmp_path):
    row = {"prompt": [user("other")], "chosen": [*TURNS, assistant("2")], "rejected": [*TURNS, assistant("3")]}
    with pytest.raises(UserError, match='begin with other messages than "prompt" has'):
        load(write(tmp_path / "p.jsonl", row))
    row = {"prompt": [user("q"), {"role": "system", "content": "s"}], "chosen": "a", "rejected": "b"}
    with pytest.raises(UserError, match="role 'system' after the first message"):
        load(write(tmp_path / "p.jsonl", row))


def test_a_system_message_stands_in_place_of_the_configured_prompt():
    form = text_format(tiny_tokenizer(), TextSettings(system_prompt="Think."))
    own = (("system", "Mine."), ("user", "Why?"))
    assert text(form.prompt_ids(own)).startswith("<|im_start|>system\nMine.<|im_end|>\n<|im_start|>user\nWhy?")
    assert form.prompt_ids((("user", "Why?"),)) == form.prompt_ids("Why?")


def test_csv_json_parquet_and_saved_datasets_give_the_same_pairs(tmp_path):
    import datasets
    import pyarrow
    from pyarrow import parquet

    table = [{**GOOD, "prompt": f'{i}, "q"\nline?', "answer": str(i) if i else None} for i in range(3)]
    want = load(write(tmp_path / "p.jsonl", *table))[0]
    (tmp_path / "p.json").write_text(json.dumps(table))
    (tmp_path / "lines.json").write_bytes((tmp_path / "p.jsonl").read_bytes())
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "p.parquet")
    dataset = datasets.Dataset.from_list(table)
    dataset.to_csv(tmp_path / "p.csv", index=False)
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "splits")
    for name in ("p.json", "lines.json", "p.parquet", "p.csv", "saved", "splits"):
        assert load(tmp_path / name)[0] == want, name
    assert load(tmp_path / "splits", split="test")[0] == want[1:2]
    for split in ("dev", "dev[:2]", "train[x]"):
        with pytest.raises(UserError, match=r"no split '.*'; it has train, test; a slice is train\[:100\]$"):
            load(tmp_path / "splits", split=split)
    for name in ("splits", "saved"):
        assert load(tmp_path / name, split="train[1:]")[0] == want[1:]
        assert load(tmp_path / name, split="train[:34%]")[0] == want[:1]
        assert read_rows(tmp_path / name, "train[1:2]")[0].where == f"{tmp_path}/{name}[train[1:2]] row 0"
    assert load(tmp_path / "splits", split="test+train[2:]")[0] == want[1:]
    with pytest.raises(UserError, match="no saved dataset"):
        load(tmp_path)
    places = [row.where for name in ("splits", "p.csv") for row in read_rows(tmp_path / name)]
    want = [*(f"splits[train] row {i}" for i in range(3)), "p.csv:3", "p.csv:5", "p.csv:7"]
    assert places == [f"{tmp_path}/{place}" for place in want]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.json", b"[1,", ["p.json:1: not valid JSON"]),
        ("p.json", b"[1]", ["p.json row 0: a JSON object is expected, got int"]),
        ("p.csv", b"prompt,chosen,rejected\na,b,c,d\n", ["p.csv:2: 3 cells are expected"]),
        ("p.csv", b"prompt,chosen,rejected\na,b\n", ['p.csv:2: "rejected" is empty']),
        ("p.csv", b"prompt,chosen\na,b\n", ['p.csv:2: the key "rejected" is missing']),
        ("p.csv", b"\xff\xfe", ["not UTF-8"]),
        ("p.parquet", b"nonsense", ["p.parquet: cannot read it"]),
    ],
)
def test_a_broken_table_is_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load(tmp_path / name)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


def test_a_hub_dataset_has_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(name, configuration=None, split=None):
        asked.append((name, configuration, split))
        if split == "dev":
            raise ValueError("Unknown split 'dev'.")
        return [GOOD, {**GOOD, "chosen": " "}]

    monkeypatch.setattr(sources, "_datasets", lambda source: types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match=r'^org/name:main\[test\[:2\]\] row 1: "chosen" is empty'):
        load("org/name:main", split="test[:2]")
    assert len(load("org/name", **SKIP)[0]) == 1
    assert asked == [("org/name", "main", "test[:2]"), ("org/name", None, "train")]
    with pytest.raises(UserError, match=r"org/name: neither a file .* \(split 'dev'\) .* Unknown split"):
        load("org/name", split="dev")


@pytest.mark.parametrize(
    ("chosen", "answer", "target"),
    [
        ("2 + 2\nFinal Answer: 4", "4", "2 + 2\nFinal Answer: 4"),
        ("2 + 2 = 4.\n", "4", "2 + 2 = 4.\nFinal Answer: 4"),
        ("2 + 2\nis 4.\n", None, "2 + 2\nFinal Answer: is 4."),
        ("four", None, "Final Answer: four"),
    ],
)
def test_sft_answers_show_their_final_answer(chosen, answer, target):
    assert sft_target(chosen, answer, FORM) == target
    last = form_with(["marker", "last_sentence"])
    assert sft_target(chosen, answer, last) == target  # a position is no mark


def test_sft_answers_with_another_mark_are_left_alone():
    both = form_with(["boxed", "marker"])
    assert sft_target(r"\boxed{4}", "4", both) == r"\boxed{4}"
    assert sft_target("4", "4", form_with(["boxed"])) == "4"
    assert sft_target("4", "4", form_with(["marker"], "####")) == "4\n#### 4"


def test_without_chain_of_thought_the_answer_alone_is_taught():
    options = form_with(["marker"], chain_of_thought=False)
    assert sft_target("2 + 2\nFinal Answer: 4\n", "5", options) == "Final Answer: 4"
    assert sft_target("2 + 2 = 4", "4", options) == "Final Answer: 4"
    assert sft_target("2 + 2\n4", None, options) == "Final Answer: 4"


def test_answers_without_chain_need_the_marker():
    config = build_config({"model": "m", "train_file": "t", "output_dir": "o", "answer_span": "boxed"})
    assert text_format(tiny_tokenizer(), config).finders[0].name == "boxed"
    with pytest.raises(UserError, match="answer_span: expected marker"):
        config.changed(chain_of_thought=False)


def test_a_run_reads_its_sources_as_configured(tmp_path):
    path = write(tmp_path / "p.jsonl", *({**GOOD, "prompt": f"q{i}", "chosen": "2"} for i in range(10)), GOOD, GOOD)
    config = build_config({"model": "m", "train_file": str(path), "output_dir": "o", "eval_fraction": 0.2})
    train, held_out, reports = load_run_pairs(config, FORM, None)
    assert (len(train), len(held_out)) == (9, 2) and reports[0].counts() == {"duplicate": 1}
    assert text(train[0].sft_ids) == "Final Answer: 2<|im_end|>" and text(train[0].chosen_ids) == "2<|im_end|>"
    two = config.changed(eval_file=str(path), chain_of_thought=False)
    train, held_out, reports = load_run_pairs(two, FORM, None)
    assert (len(train), len(held_out)) == (11, 11) and [type(report) for report in reports[:2]] == [RowReport] * 2
    assert any("learned by heart" in words for words in reports[2:])  # the same rows stand in both
    assert text_format(tiny_tokenizer(), two).system_prompt == DIRECT_SYSTEM_PROMPT
    assert text_format(tiny_tokenizer(), config).system_prompt == config.system_prompt


def test_a_run_says_once_what_sft_adds_to_the_answers(tmp_path):
    """A poem has no final answer; a maths answer that has one stays as it is."""
    poem = {"prompt": "A poem on rain.", "chosen": "Rain falls.\nI sleep.", "rejected": "Sun."}
    done = {"prompt": "2 + 2?", "chosen": "Final Answer: 4", "rejected": "Final Answer: 5", "answer": "4"}
    rows = ({**row, "prompt": row["prompt"] * i} for row in (poem, done) for i in (1, 2))
    path = write(tmp_path / "p.jsonl", *rows)

    def said(**more):
        config = build_config({"model": "m", "train_file": str(path), "output_dir": "o", **more})
        form = text_format(tiny_tokenizer(), config)
        train, held_out, words = load_run_pairs(config, form, None)
        return [text(pair.sft_ids) for pair in (*train, *held_out)], [w for w in map(str, words) if "added" in w]

    taught, (words,) = said()
    assert words == (
        f"{path}: 2 of 4 chosen answers have no 'Final Answer:'; it is added to them for SFT; "
        "answer_span: last_sentence leaves it off"
    )
    assert sum("Rain falls.\nFinal Answer: I sleep." in t for t in taught) == 2
    taught, words = said(answer_span="last_sentence", system_prompt="")
    assert not words and sum("Final Answer" in t for t in taught) == 2
    assert not said(sft_epochs=0)[1] and not said(chain_of_thought=False)[1]


def test_prompts_follow_the_chat_template_and_answers_close_the_turn():
    tokenizer = tiny_tokenizer()
    form = text_format(tokenizer, TextSettings(system_prompt="Think."))
    assert tokenizer.decode(form.prompt_ids("Why?")) == (
        "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(form.answer_ids("So.")) == "So.<|im_end|>"


def test_the_template_and_not_eos_says_how_a_turn_ends():
    """Base models keep <|endoftext|> as eos while their chat template closes turns with another token."""
    tokenizer = tiny_tokenizer()
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<pad>"
    assert text_format(tokenizer, TextSettings(system_prompt="")).end_of_turn == end_of_turn


def test_a_template_without_system_role_gets_the_system_prompt_in_the_question():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = tiny_tokenizer(template + "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    assert tokenizer.decode(text_format(tokenizer, TextSettings(system_prompt="Think.")).prompt_ids("Why?")) == (
        "<|im_start|>Think.\n\nWhy?<|im_end|>"
    )


def test_without_a_template_the_format_is_plain():
    tokenizer = tiny_tokenizer(chat_template=None)
    form = text_format(tokenizer, TextSettings(system_prompt="Think."))
    assert tokenizer.decode(form.prompt_ids("Why?")) == "Think.\n\nQuestion: Why?\nAnswer:\n"
    assert form.end_of_turn == tokenizer.eos_token_id


def test_the_split_keeps_a_prompt_on_one_side(tmp_path):
    table = [{**GOOD, "prompt": f"q{i // 2}", "chosen": f"c{i}"} for i in range(20)]
    train, held = split_pairs(load(write(tmp_path / "p.jsonl", *table))[0], 0.3, seed=1)
    assert len(held) == 6 and len(train) == 14
    assert not {p.prompt_ids for p in train} & {p.prompt_ids for p in held}
    assert split_pairs([*train, *held], 0.3, seed=1)[1] == sorted(held, key=[*train, *held].index)


def test_padding_is_left_for_prompts_and_right_for_completions():
    batch = collate([[1, 2, 3], [4]], [[5], [6, 7], [8, 9, 10], [11]], pad_id=0)
    assert batch.num_generations == 2
    assert batch.prompt_ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert batch.prompt_mask.tolist() == [[True, True, True], [False, False, True]]
    assert batch.completion_ids.tolist() == [[5, 0, 0], [6, 7, 0], [8, 9, 10], [11, 0, 0]]
    assert batch.lengths.tolist() == [1, 2, 3, 1]
    part = batch.select_prompts(0, 1)
    assert part.completion_ids.tolist() == [[5, 0], [6, 7]] and torch.equal(part.prompt_ids, batch.prompt_ids[:1])
    assert batch.select_prompts(1, 2).prompt_ids.tolist() == [[4]]
