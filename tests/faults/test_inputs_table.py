"""Inputs that no one should give, with the line that each must give. One process, no model: a few milliseconds each."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from gem import cli
from gem.config.read import build_config
from gem.config.settings import RowSettings
from gem.data.answers import answer_finders
from gem.data.pairs import load_pairs, load_prompts
from gem.data.prompts import text_format
from gem.data.sources import read_rows
from gem.errors import UserError, short
from gem.terminal.console import make_console, print_result, print_warning, set_level
from gem.terminal.text import visible
from tests.faults.calls import call
from tests.helpers import FORM, TextSettings, tiny_tokenizer

HEAD = "model: org/m\ntrain_file: org/t\noutput_dir: out\n"
BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnopqrstuvwxy", "bcdefghijklmnopqrstuvwxyz")
)

CONFIGS = {
    "a key twice": ("seed: 1\nseed: 2\n", "the key 'seed' stands in line 4 too"),
    "an alias": ("system_prompt: &a x\nanswer_marker: *a\n", "an alias (*) is not read: write it out"),
    "a bomb of aliases": (BOMB, "an alias (*) is not read"),
    "merged keys": ("x: &x {a: 1}\ny: {<<: *x}\n", "an alias (*) is not read"),
    "nested": ("seed: " + "[" * 500, "nested too deeply"),
    "a list of lists": ("answer_span: [[marker]]\n", "answer_span: expected a list of marker"),
    "5,000 digits": ("seed: " + "9" * 5000 + "\n", "not valid YAML"),
    "5,000 hexadecimal digits": ("seed: 0x" + "f" * 5000 + "\n", "got a whole number of 20000 bits"),
    "a seed of 33 bits": ("seed: 4294967296\n", "config: seed: expected at most 4294967295, got 4294967296"),
    "a negative seed": ("seed: -1\n", "config: seed: expected at least 0, got -1"),
    "NaN": ("learning_rate: .nan\n", "config: learning_rate: expected "),
    "infinity": ("learning_rate: 1e400\n", "config: learning_rate: expected "),
    "a date": ("seed: 2026-01-01\n", "config: seed: expected int, got datetime.date(2026, 1, 1)"),
    "no date": ("seed: 2026-99-99\n", "not valid YAML: month must be in 1..12"),
    "bytes": ("system_prompt: !!binary aGk=\n", "config: system_prompt: expected str, got b'hi'"),
    "a type alone": ("seed: !!int\n", "not valid YAML: no value: "),
    "a tag": ("seed: !!python/object/apply:os.system [ls]\n", "not valid YAML: could not determine a constructor"),
    "a number as key": ("1: 2\n", "config: unknown key '1'"),
    "nothing as key": ("null: 2\n", "config: unknown key 'None'"),
    "a list as key": ("? [a]\n: 2\n", "not valid YAML"),
    "a long key": ("k" * 1000 + ": 1\n", "config: unknown key 'kkk"),
    "a long value": ("loss_type: " + "x" * 100_000 + "\n", "config: loss_type: expected one of sum, mean"),
    "two documents": ("---\nseed: 1\n---\nseed: 2\n", "not valid YAML: expected a single document"),
    "no mapping": ("- a\n", "not valid YAML: while parsing a block mapping"),
    "a pattern that is none": ("answer_span: ['regex:(']\n", "is not a regular expression"),
    "a pattern too large": ("answer_span: ['regex:a{99999999999}']\n", "is not a regular expression"),
    "tokens past counting": ("answer_span: [last_tokens:" + "9" * 5000 + "]\n", "answer_span: expected marker"),
    "half a character": ('system_prompt: "\\ud800"\n', "not "),
    "no user": ("eval_file: ~nobody-at-all/x\n", "config: eval_file: ~nobody-at-all/x: there is no such user"),
    "a NUL": ('eval_file: "a\\0b"\n', "config: eval_file: 'a\\x00b' is no name of a file"),
    "an overlong name": (f"eval_file: {'x' * 5000}\n", "config: eval_file: cannot look at 'xxx"),
    "escapes": ('loss_type: "\\e[31mred"\n', r"got '\x1b[31mred'"),
    "markup": ("loss_type: '[red]'\n", "got '[red]'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config(case, tmp_path):
    text, words = CONFIGS[case]
    (tmp_path / "c.yaml").write_text(HEAD + text)
    code, out, errors = call("train", tmp_path / "c.yaml")
    assert (code, out, errors.count("\n")) == (2, "", 1) and words in errors and len(errors) < 700, errors
    assert "\x1b" not in errors


def test_a_config_that_is_no_text(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"seed: \xff\xfe\n")
    assert call("train", tmp_path / "c.yaml")[::2] == (
        2,
        mock_line(tmp_path / "c.yaml", "not valid YAML: 'utf-8' codec"),
    )


class mock_line:
    """Equal to one line of gem's that begins with a place and has the words after it."""

    def __init__(self, place, words):
        self.start = f"gem: {place}: {words}"

    def __eq__(self, other):
        return other.startswith(self.start) and other.count("\n") == 1


FLAGS = {
    "no flag": (["x"], "flags: expected one config and then --key value, got 'x'"),
    "no value": (["--seed"], "--seed: expected a value, got none"),
    "an alias": (["--seed", "*a"], "config: seed: expected int, got '*a'"),
    "nested": (["--seed", "[" * 500], "config: seed: expected int, got '[[["),
    "digits": (["--seed", "9" * 5000], "config: seed: expected int, got '999"),
    "half a character": (["--system_prompt", "\udcff"], "config: system_prompt: not UTF-8 text"),
    "a level": (["--log-level", "loud"], "--log-level: expected one of debug, info, warning, error, got 'loud'"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_a_flag(case, tmp_path):
    flags, words = FLAGS[case]
    (tmp_path / "c.yaml").write_text(HEAD)
    code, _, errors = call("train", tmp_path / "c.yaml", *flags)
    assert code == 2 and errors.count("\n") == 1 and words in errors and len(errors) < 700, errors


PAIR = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
ROWS = {
    "5,000 digits": ('{"answer": ' + "9" * 5000 + "}", ":2: not valid JSON (a number of more than 4,300 digits)"),
    "nested": ("[" * 100_000, ":2: not valid JSON (nested too deeply)"),
    "a list": ("[1]", ":2: a JSON object is expected, got list"),
    "cut off": ('{"prompt": "a', ":2: not valid JSON (Unterminated string"),
    "half a character": (json.dumps({**PAIR, "chosen": "\ud800"}), ':2: "chosen" holds half a character'),
    "a role": (json.dumps({**PAIR, "prompt": [{"role": "x", "content": "y"}]}), "has a message of role 'x'"),
    "no text": (json.dumps({**PAIR, "chosen": 4}), ':2: "chosen" must be text, got int'),
    "equal": (json.dumps({**PAIR, "chosen": "5"}), ':2: "chosen" and "rejected" are the same text'),
    "no answer": (json.dumps({**PAIR, "answer": {"a": 1}}), ':2: "answer" must be text or a number, got dict'),
    "UTF-16": ('{"prompt": "\u00e9"}'.encode("utf-16").decode("latin-1"), ":2: not "),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row(case, tmp_path):
    text, words = ROWS[case]
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(PAIR) + "\n" + text + "\n", encoding="latin-1" if case == "UTF-16" else "utf-8")
    with pytest.raises(UserError) as error:
        load_pairs(str(file), FORM, 512, RowSettings())
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500
    pairs, report = load_pairs(str(file), FORM, 512, RowSettings(bad_rows="skip"))
    assert len(pairs) == 1 and report.counts() == {"bad": 1}


def test_compressed_rows(tmp_path):
    lines = "".join(json.dumps({**PAIR, "prompt": f"{i}?"}) + "\n" for i in range(3)).encode()
    for name, data in (("a.jsonl.gz", lines), ("b.csv.gz", b"prompt,chosen,rejected\r\n1?,2,3\r\n")):
        (tmp_path / name).write_bytes(gzip.compress(data))
    assert [row.values["prompt"] for row in read_rows(tmp_path / "a.jsonl.gz")] == ["0?", "1?", "2?"]
    assert read_rows(tmp_path / "b.csv.gz")[0].values == {"prompt": "1?", "chosen": "2", "rejected": "3"}
    whole = gzip.compress(lines)
    for name, data in (
        ("cut.jsonl.gz", whole[:-12]),
        ("none.jsonl.gz", b"{}\n"),
        ("flip.jsonl.gz", whole[:15] + b"\0\0" + whole[17:]),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: not a whole gzip file: .*; compress it again"):
            read_rows(tmp_path / name)


RAISES = (
    "{% for m in messages %}{% if loop.index0 % 2 != (m['role'] == 'assistant') | int %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{{ m['content'] }}<|im_end|>{% endfor %}"
)
TWO = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]


def test_a_template_that_raises_names_the_row_and_follows_bad_rows(tmp_path):
    form = text_format(tiny_tokenizer(RAISES), TextSettings(system_prompt=""))
    rows = [PAIR, {**PAIR, "prompt": TWO}, {**PAIR, "prompt": "3?"}]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = r"p.jsonl:2: the model's chat template does not take it \(messages of user, user\): Roles must alternate"
    with pytest.raises(UserError, match=words) as error:
        load_pairs(str(file), form, 512, RowSettings())
    assert "\n" not in str(error.value)
    pairs, report = load_pairs(str(file), form, 512, RowSettings(bad_rows="skip"))
    assert len(pairs) == 2 and "left out 1 of 3 rows (1 bad)" in str(report)
    config = build_config(
        {"model": "m", "train_file": "t", "output_dir": "o", "prompts_file": str(file), "bad_rows": "skip"}
    )
    assert len(load_prompts(config, form, 512)[0]) == 2


TEMPLATES = {
    "syntax": ("\n\n{% for m in messages %}", r"chat template \(of the tokenizer\) has an error of syntax in line 3"),
    "raises on all": ("{{ raise_exception('no') }}", "model: of the tokenizer: one question and .*: no; correct"),
    "a type": ("{{ 1 + 'a' }}", "does not take it .*unsupported operand"),
    "division": ("{{ 1 / 0 }}", "does not take it .*division by zero"),
    "itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the model's chat template failed: RecursionError"),
    "attributes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "does not take it .*unsafe"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_that_cannot_be_used(case):
    template, words = TEMPLATES[case]
    with pytest.raises(UserError, match=words) as error:
        text_format(tiny_tokenizer(template), TextSettings())
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_what_never_ends_has_a_time_limit(monkeypatch):
    monkeypatch.setattr("gem.data.limits.SECONDS", 0.05)
    (finder,) = answer_finders(["regex:(a|aa)+$"])
    with pytest.raises(UserError, match=r"answer_span: regex:.*: on one answer it took more than 0.05 s"):
        finder.place("a" * 36 + "!")
    assert finder.place("aaa") is not None
    endless = "{% for i in range(9999) %}{% for j in range(999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match="the chat template took more than"):
        text_format(tiny_tokenizer(endless), TextSettings())


def test_text_of_others_is_shown_as_it_is(capsys):
    hostile = "[red]a[/b] \\[/b] :smile: \x1b]0;title\x07 \x1b[31m\u202e"
    for console in (make_console(), make_console(result=True)):
        console.print(hostile, soft_wrap=True)
    shown = capsys.readouterr().out.splitlines()
    assert shown == [visible(hostile)] * 2 and "\x1b" not in shown[0] and "[red]" in shown[0]


def test_log_levels(capsys):
    try:
        seen = {}
        for level in ("debug", "info", "warning", "error"):
            set_level(level)
            console = make_console()
            for words in ("Loading m", "Warning: w", "Guard kl: g", "gate: SEGA is not run"):
                console.print(words)
            print_warning(console, "2 rows left out")
            make_console(result=True).print("table")
            print_result(console, "Run: r")
            seen[level] = capsys.readouterr().out.split("\n")[:-1]
    finally:
        set_level("info")
    warned = ["Warning: w", "Guard kl: g", "gate: SEGA is not run", "2 rows left out"]
    everything, asked = ["Loading m", *warned, "table", "Run: r"], ["table", "Run: r"]
    assert seen == {"debug": everything, "info": everything, "warning": everything[1:], "error": asked}


def test_a_value_in_a_message_is_short():
    deep: list = []
    for _ in range(60):
        deep = [deep, deep]
    assert short(deep) == "a list of 2" and short(10**5000) == "a whole number of 16610 bits"
    assert short("a\nb") == r"'a\nb'" and len(short("x" * 10**6)) < 200 and short([1, "a"]) == "[1, 'a']"


def test_a_bug_is_one_line_and_its_trace_is_in_a_file(monkeypatch, tmp_path):
    def broken(*_):
        raise KeyError("what\nis it")

    monkeypatch.setattr(cli, "commented_config", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, out, errors = call("config")
    assert (code, out, errors.count("\n")) == (1, "", 1)
    assert errors.startswith(r"gem: a bug in gem, please report it: KeyError: 'what\nis it'; its trace is in ")
    (file,) = tmp_path.iterdir()
    assert str(file) in errors and "in broken" in file.read_text() and "torch" in file.read_text()
    code, _, errors = call("--debug", "config")
    assert code == 1 and "Traceback" in errors and "in broken" in errors
    code, _, errors = call("config", "--debug")
    assert code == 1 and "Traceback" in errors


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_full_memory_is_no_bug(error, monkeypatch):
    def broken(*_):
        raise error

    monkeypatch.setattr(cli, "commented_config", broken)
    code, _, errors = call("config")
    assert code == 2 and errors.startswith("gem: out of memory: ") and errors.count("\n") == 1


def test_a_reader_that_has_gone(monkeypatch):
    def broken(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "commented_config", broken)
    monkeypatch.setattr("gem.terminal.ending._forget_output", lambda: None)
    assert call("config") == (141, "", "")


def test_a_terminal_that_is_not_utf_8(monkeypatch, tmp_path):
    file = (tmp_path / "out").open("w", encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", file)
    cli._write_rows([{"a": "\u4e2d\u00e9\U0001f600"}], None)
    monkeypatch.setattr(sys, "argv", ["gem", "config"])
    monkeypatch.setattr(cli, "commented_config", lambda _: "\u4e2d\n")
    cli.app.standalone_mode = True
    with pytest.raises(SystemExit) as end:
        cli.main()
    file.close()
    first, second = (tmp_path / "out").read_text(encoding="latin-1").splitlines()
    assert json.loads(first) == {"a": "\u4e2d\u00e9\U0001f600"} and second == r"\u4e2d" and not end.value.code


def test_more_pairs_than_there_are(tmp_path):
    code, _, errors = call("data", "arithmetic", "--pairs", 10**9, "--out", tmp_path / "p.jsonl")
    assert code == 2 and errors.count("\n") == 1 and "--pairs: expected at most" in errors
    assert list(tmp_path.iterdir()) == [] and Path(tmp_path).is_dir()


@pytest.mark.parametrize(("number", "words"), [(13, "Permission denied"), (40, "Too many levels of symbolic links")])
def test_a_place_that_cannot_be_looked_at(number, words, tmp_path, monkeypatch):
    """As another user would see it: for root everything opens."""
    real = Path.stat

    def stat(self, **arguments):
        if self.name == "closed":
            raise OSError(number, words, str(self))
        return real(self, **arguments)

    monkeypatch.setattr(Path, "stat", stat)
    (tmp_path / "c.yaml").write_text(HEAD)
    place = str(tmp_path / "closed")
    for flags, key in (
        (["train", tmp_path / "c.yaml", "--model", place], "config: model"),
        (["train", tmp_path / "c.yaml", "--train_file", place], "config: train_file"),
        (["train", tmp_path / "c.yaml", "--output_dir", place], "config: output_dir"),
        (["train", place], "config"),
        (["score", place, "org/data"], "model"),
        (["evaluate", "org/model", place], "data"),
    ):
        code, _, errors = call(*flags)
        assert code == 2 and errors == f"gem: {key}: cannot look at '{place}': {words}\n"
