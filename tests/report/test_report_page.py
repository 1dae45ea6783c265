"""The page's HTML without a browser: what is in it, that nothing of the data is code, and how it is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gem.errors import UserError
from gem.report import charts, views
from gem.report.page import as_script_json, shared_ends, visible, write_report
from gem.report.records import read_metrics
from tests.report.report_data import (
    HOSTILE,
    calibrated_score,
    completion_row,
    hostile_rows,
    make_run,
    metric_rows,
    write_rows,
)


class Elements(HTMLParser):
    """Start tags with their attributes, and the text of each script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.within = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.within = tag == "script"

    def handle_endtag(self, tag):
        self.within = False

    def handle_data(self, data):
        if self.within:
            self.scripts.append((self.tags[-1][1], data))


def page(source: Path, **options) -> str:
    return write_report(source, source.parent / "page.html", **options).read_text()


def data_of(html: str, name: str = "data") -> dict:
    (text,) = [text for attributes, text in Elements(html).scripts if attributes.get("id") == name]
    return json.loads(text)


def test_a_run_has_every_part(tmp_path):
    html = page(make_run(tmp_path / "run"))
    ids = {attributes.get("id") for _, attributes in Elements(html).tags}
    assert {"overview", "score", "evaluations", "curves", "completions", "settings", "chart-0", "tokens-0"} <= ids
    assert "HuggingFaceTB" not in re.search(r'class="model">(.*?)<', html)[1]  # the score's file names the model first
    assert "0.121 → 0.305" in html and "[0.225,\u00a00.385]" in html  # the tile: sampled accuracy
    assert "fired 2 times" in html and "fork_weight is now 0.25" in html and "SEGA step 17" in html
    assert "after SFT" in html and "after SEGA" in html and "after SEGA 12" not in html
    assert calibrated_score()["verdict"]["words"] in html


def test_only_what_a_file_holds_is_there(tmp_path):
    html = page(write_rows(tmp_path / "rows.jsonl", [completion_row()]))
    ids = {attributes.get("id") for _, attributes in Elements(html).tags}
    assert "completions" in ids and not {"score", "curves", "evaluations", "settings"} & ids
    path = tmp_path / "score.json"
    path.write_text(json.dumps({"kind": "gem-score"}))
    assert 'id="completions"' not in page(path)
    path.write_text(json.dumps({**calibrated_score(), "samples": None, "verdict": {"kind": "explained_by_length"}}))
    html = page(path)
    assert "The score is explained by length" in html and "ROC" not in html and "+1.320" in html


def test_the_page_loads_nothing_and_its_policy_forbids_it(tmp_path):
    html = page(make_run(tmp_path / "run"))
    elements = Elements(html)
    (policy,) = [a["content"] for _, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    addresses = [value for _, a in elements.tags for key, value in a.items() if key in ("src", "href", "action")]
    assert addresses and all(value.startswith("#") or value == "data:," for value in addresses)
    assert not re.search(r"@import|url\(|https?://", html)
    assert not [a for _, a in elements.tags if any(key.startswith("on") or key == "style" for key in a)]


def test_hostile_text_stays_text(tmp_path):
    html = page(write_rows(tmp_path / "rows.jsonl", hostile_rows(2000)))
    elements = Elements(html)
    assert [a for tag, a in elements.tags if tag == "script"] == [
        {"type": "application/json", "id": "data"}, {"type": "application/json", "id": "tokens-0"},
        {"type": "application/json", "id": "tokens-2"}, {},
    ]  # fmt: skip
    assert not [tag for tag, _ in elements.tags if tag == "img"]
    for _, text in elements.scripts[:-1]:
        assert not re.search("[<>&\u2028\u2029\u202e\x00]", text)
    data = data_of(html)
    assert data["completions"][1]["text"] == "".join(map(visible, HOSTILE))
    assert "{{7*7}}" in data["completions"][0]["text"] and "49" not in data["completions"][0]["text"]


def test_hostile_names_stay_text(tmp_path):
    """What is written into the page itself: a run's name, settings, stages, guards, a score's words."""
    evil = HOSTILE[1].replace("/", "") + HOSTILE[0].replace("/", "")
    run = make_run(tmp_path / evil)
    rows = [{**row, "stage": row["stage"].replace("SEGA", evil)} for row in metric_rows()]
    rows = [{**row, evil: 1.0, "after": evil, "done": evil, "guards": [evil]} for row in rows]
    write_rows(run / "metrics.jsonl", rows)
    score = calibrated_score()
    score |= {"model": evil, "verdict": {"kind": evil, "words": evil}, "pair_accuracy": {evil: {"value": 0.5}}}
    (run / "score.json").write_text(json.dumps(score))
    (run / "config.yaml").write_text(f"model: '{evil}'")
    elements = Elements(page(run))
    tags = [tag for tag, _ in elements.tags]
    assert "img" not in tags and "iframe" not in tags
    scripts = [a for tag, a in elements.tags if tag == "script"]
    assert [a for a in scripts if a.get("type") != "application/json"] == [{}]


def test_json_within_a_script():
    text = as_script_json({"a": "</script><!--&\u2028\u2029é"})
    assert text == '{"a":"\\u003c/script\\u003e\\u003c!--\\u0026\\u2028\\u2029é"}'
    assert json.loads(text) == {"a": "</script><!--&\u2028\u2029é"}


def test_what_cannot_be_seen_is_written_out():
    assert visible("a\x00b\x1bc\x7f\x85\r") == "a⟨U+0000⟩b⟨U+001B⟩c⟨U+007F⟩⟨U+0085⟩⟨U+000D⟩"
    assert visible("\u202eabc\u2066\ufeff\ud800\u200b") == "⟨U+202E⟩abc⟨U+2066⟩⟨U+FEFF⟩\ufffd⟨U+200B⟩"
    for kept in ("line\n\ttab", "👩‍👩‍👧", "שלום", "é"):
        assert visible(kept) == kept


def test_lengths_are_those_of_javascript(tmp_path):
    html = page(write_rows(tmp_path / "rows.jsonl", [completion_row(tokens=["🎉", "é", "\x00", "ab"])]))
    assert data_of(html, "tokens-0")["lengths"] == [2, 1, 8, 2]


@pytest.mark.parametrize(
    "prompts, expected",
    [
        (["only"], (0, 0)),
        (["sys\nuser: a\nend\n", "sys\nuser: b\nend\n"], (4, 5)),
        (["same\nabc", "same\nabd"], (5, 0)),
        (["x", "y"], (0, 0)),
        (["<s>a?<|end|>\n<|start|>\n", "<s>b?<|end|>\n<|start|>\n"], (0, 18)),
        (["a\nb\n", "a\nb\nc\n"], (4, 0)),
    ],
)
def test_what_all_prompts_share(prompts, expected):
    assert shared_ends(prompts) == expected


def test_too_many_tokens_keep_every_kth_prompt(tmp_path):
    rows = [completion_row(p, c, tokens=["a", "b", "c", "d"]) for p in range(6) for c in range(2)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert data_of(page(path))["leftOut"] == 0
    data = data_of(page(path, max_tokens=24))
    assert [i for i, one in enumerate(data["completions"]) if one.get("tokens")] == [0, 1, 4, 5, 8, 9]
    assert data["leftOut"] == 6 and all(one["text"] == "abcd" for one in data["completions"])


def test_the_page_is_replaced_whole_or_not_at_all(tmp_path):
    out = tmp_path / "page.html"
    out.write_text("before")
    bad = write_rows(tmp_path / "rows.jsonl", [{"prompt": 1}])
    with pytest.raises(UserError):
        write_report(bad, out)
    assert out.read_text() == "before"
    write_report(write_rows(bad, [completion_row()]), out)
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "rows.jsonl"]


@pytest.mark.parametrize(
    "source, out, words",
    [
        ("nothing", "page.html", "nothing: no such file"),
        ("rows", "no/page.html", "--out: expected a file in a directory"),
        ("rows", ".", "--out: expected a file"),
    ],
)
def test_paths_that_are_wrong(tmp_path, source, out, words):
    write_rows(tmp_path / "rows", [completion_row()])
    with pytest.raises(UserError, match=words):
        write_report(tmp_path / source, tmp_path / out)


def test_the_command(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [completion_row()])
    call = [sys.executable, "-m", "gem", "report"]
    made = subprocess.run([*call, rows, "--out", tmp_path / "a.html"], capture_output=True, text=True)
    assert (made.returncode, made.stderr) == (0, f"Page: {tmp_path / 'a.html'}\n") and (tmp_path / "a.html").is_file()
    failed = subprocess.run([*call, tmp_path / "none"], capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode == 2 and failed.stderr.startswith("gem: ") and failed.stderr.count("\n") == 1


def test_reading_files_needs_no_torch():
    code = "import sys, gem.report.page; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_curves_of_a_run(tmp_path):
    rows = read_metrics(write_rows(tmp_path / "metrics.jsonl", metric_rows()))
    axis = views.run_axis(rows)
    assert axis.stages == [("SFT", 1, 12), ("SEGA", 13, 36)]
    assert axis.guards == [
        (21, "guard h_final: fork_weight is now 0.5"),
        (29, "guard h_final: fork_weight is now 0.25"),
    ]
    assert [axis.words(x) for x in (0, 1, 12, 13, 36)] == [
        "start",
        "SFT step 1",
        "SFT step 12",
        "SEGA step 1",
        "SEGA step 24",
    ]
    main, rest = views.run_charts(rows, axis)
    titles = {chart.title: chart for chart in main}
    assert {"Entropies", "KL from the start", "Length", "Learning rate", "Loss, SFT", "Loss, SEGA"} <= set(titles)
    assert {chart.title for chart in rest} == {"num_tokens", "step_time", "eval/preference_num_pairs", "eval/seconds",
        "eval/calibration_error", "eval/gem/h_final", "eval/gem/h_fork", "eval/gem/mean_length"}  # fmt: skip
    kl = titles["KL from the start"]
    assert len(kl.points) == 24 and kl.svg.count('class="guard-mark"') == 2
    value = next(row["kl"] for row in rows if row["total_steps"] == 21)
    words = "guard h_final: fork_weight is now 0.5"
    expected = {"at": "SEGA step 9", "values": [charts.number(value)], "guards": [words]}
    assert {key: kl.points[8][key] for key in expected} == expected
    assert titles["Loss, SFT"].svg.count("guard-mark") == 0
    accuracy = titles["Right answers, held out"]
    assert accuracy.points[0]["at"] == "start" and accuracy.points[0]["values"][0] == "0.121 [0.041, 0.201]"


def test_a_run_of_one_step_and_one_value():
    rows = [{"stage": "SFT", "step": 1, "loss": 0.0, "total_steps": 1}]
    (chart,), _ = views.run_charts(rows, views.run_axis(rows))
    assert chart.points == [{"x": 46.0, "at": "SFT step 1", "values": ["0"], "guards": []}]


def test_the_name_of_a_stage_stays_in_the_drawing():
    points = [charts.Series("a", [(step, 1.0 + step, None, None) for step in range(17)])]
    drawn = charts.lines("A", "nats", points, charts.Axis([("SFT", 1, 12), ("rejection sampling", 13, 16)])).svg
    named = re.findall(r'<text x="([\d.]+)"[^>]*class="stage-name( end)?">([^<]+)', drawn)
    assert [name for _, _, name in named] == ["SFT", "rejection sampling"]
    for x, end, name in named:
        left = float(x) - 6.5 * len(name) * bool(end)
        assert left >= charts.LEFT and left + 6.5 * len(name) <= charts.WIDTH, name


def test_evaluations_before_and_after(tmp_path):
    rows = read_metrics(write_rows(tmp_path / "metrics.jsonl", metric_rows()))
    table = views.evaluation_table(rows, views.run_axis(rows))
    assert table["columns"] == ["start", "after SFT", "after SEGA"] and table["between"] == 1
    found = {words: (cells, change) for words, cells, change in table["rows"]}
    cells, change = found["right: one sample"]
    assert cells[0] == ("0.121", "[0.041,\u00a00.201]") and change == "+0.184"
    assert table["sizes"] == "64 pairs"


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1, [0, 0.5, 1]),
        (0.13, 0.87, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-3, 12, [-5, 0, 5, 10, 15]),
        (1e-5, 1e-4, [0, 5e-5, 1e-4]),
        (2, 2, [1, 1.5, 2, 2.5, 3]),
        (0, 0, [-0.5, 0, 0.5]),
    ],
)
def test_ticks_are_round_and_hold_the_values(low, high, expected):
    assert charts.nice_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    "value, words",
    [(None, "–"), (3.0, "3"), (-0.5, "−0.500"), (0.00406, "0.00406"), (64.2871, "64.287"), (1234.56, "1234.6"),
     (1e-5, "1e−05"), (2.5e7 + 0.5, "2.5e+07")],
)  # fmt: skip
def test_numbers(value, words):
    assert charts.number(value) == words


def test_script_and_style_may_stand_in_html():
    folder = Path(charts.__file__).parent
    assert "</" not in (folder / "page.js").read_text().lower()
    assert "<!--" not in (folder / "page.js").read_text() and "<" not in (folder / "page.css").read_text()
