"""RUN/model is used as its run trained it: system prompt, marker and span of answers are those of RUN/config.yaml."""

import io
import json

import pytest
import torch
from rich.console import Console

import gem
from gem.config.read import build_config, config_text
from gem.config.settings import DIRECT_SYSTEM_PROMPT, SYSTEM_PROMPT
from gem.config.use import GenerateSettings, ScoreSettings
from gem.demo.arithmetic import arithmetic_pairs
from gem.files import write_jsonl
from gem.model.opened import own_dtype
from gem.model.run_text import as_in_run
from tests.gem.test_cli import call
from tests.helpers import save_tiny, tiny_model

OWN = {"system_prompt": "Write a poem.", "answer_marker": "####", "answer_span": ["boxed", "marker"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    save_tiny(run / "model", context=1024)
    write_config(run)
    write_jsonl(run / "pairs.jsonl", arithmetic_pairs(3, seed=3))
    return run


def write_config(run, **more):
    needed = {"model": "m", "train_file": "t.jsonl", "output_dir": str(run)}
    (run / "config.yaml").write_text(config_text(build_config({**needed, **OWN, **more})))


def used(model, settings, **otherwise):
    console = Console(file=io.StringIO(), width=500)
    return as_in_run(model, settings, console, **otherwise), console.file.getvalue()


def test_what_is_not_given_is_the_runs(run):
    settings, said = used(run / "model", ScoreSettings(batch_size=3))
    assert (settings.system_prompt, settings.answer_marker) == ("Write a poem.", "####")
    assert settings.answer_span == ("boxed", "marker") and settings.batch_size == 3
    assert said == f"System prompt, answer marker and answer span are those of {run / 'config.yaml'}\n"
    settings, said = used(str(run / "model"), ScoreSettings(system_prompt="", answer_span="marker"))
    assert (settings.system_prompt, settings.answer_marker, settings.answer_span) == ("", "####", ("marker",))
    assert said == f"Answer marker is that of {run / 'config.yaml'}\n"
    given = ScoreSettings(system_prompt="", answer_marker=":", answer_span="marker")
    assert used(run / "model", given) == (given, "")


def test_a_run_without_chain_of_thought_asks_for_the_answer_alone(tmp_path):
    (tmp_path / "model").mkdir()
    write_config(tmp_path, chain_of_thought=False)
    assert not used(tmp_path / "model", ScoreSettings())[0].chain_of_thought
    settings, _ = used(tmp_path / "model", ScoreSettings(system_prompt="Say."))
    assert settings.chain_of_thought and settings.system_prompt == "Say."  # else it would be replaced


def test_other_models_have_the_defaults(run, tmp_path):
    settings = GenerateSettings()
    for model in ("org/model", str(tmp_path), (tiny_model(), None), tmp_path / "model"):
        assert used(model, settings) == (settings, "")
    assert used("org/model", settings, system_prompt="")[0].system_prompt == ""
    assert used(run / "model", settings, system_prompt="")[0].system_prompt == "Write a poem."
    assert used("org/model", GenerateSettings(system_prompt="x"), system_prompt="")[0].system_prompt == "x"


@pytest.mark.parametrize(
    "content",
    [b"a: [", b"\xff\xfe", b"", b"just words", b"lr: 0.1\nsteps: 3\n", b"\x00", b"a: 1\na: 2\n", b"a: &x [*x]"],
)
def test_a_config_that_is_not_the_runs_costs_a_line(tmp_path, content):
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").write_bytes(content)
    settings, said = used(tmp_path / "model", ScoreSettings(), system_prompt="")
    assert settings == ScoreSettings(system_prompt="")
    assert said.startswith(f"Warning: {tmp_path / 'config.yaml'}: ") and said.count("\n") == 1


def test_a_wrong_value_in_it_costs_a_line(run, tmp_path):
    (tmp_path / "model").mkdir()
    text = (run / "config.yaml").read_text().replace("answer_marker: '####'", "answer_marker: 3")
    (tmp_path / "config.yaml").write_text(text)
    settings, said = used(tmp_path / "model", ScoreSettings())
    assert settings == ScoreSettings() and "answer_marker" in said and said.count("\n") == 1


def test_a_config_with_settings_of_another_version_is_read(run, tmp_path):
    (tmp_path / "model-20").mkdir()
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text() + "of_next_year: 1\n")
    assert used(tmp_path / "model-20", ScoreSettings())[0].answer_marker == "####"


@pytest.fixture
def prompts(monkeypatch):
    """The system prompt of each prompt that is made."""
    found = []
    from gem.data import prompts as module

    plain = module.TextFormat.prompt_ids

    def prompt_ids(self, prompt):
        found.append(self.system_prompt)
        return plain(self, prompt)

    monkeypatch.setattr(module.TextFormat, "prompt_ids", prompt_ids)
    return found


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "MODEL", "PAIRS"],
        ["score", "MODEL", "PAIRS"],
        ["generate", "MODEL", "Hello?", "--max-completion-length", 4],
        ["calibrate", "MODEL", "PAIRS", "--sample", 0, "--out", "OUT"],
        ["chat", "MODEL", "--max-completion-length", 4],
    ],
)
def test_every_command_asks_as_the_run_did(run, prompts, tmp_path, monkeypatch, capsys, command):
    places = {"MODEL": run / "model", "PAIRS": run / "pairs.jsonl", "OUT": tmp_path / "s.json"}
    words = [places.get(word, word) for word in command]
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello?\n"))
    code, _, err = call(words, monkeypatch, capsys)
    assert code == 0, err
    assert set(prompts) == {"Write a poem."} and err.count(f"are those of {run / 'config.yaml'}") == 1
    prompts.clear()
    (tmp_path / "s.json").unlink(missing_ok=True)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello?\n"))
    assert call([*words, "--system-prompt", "Mine."], monkeypatch, capsys)[0] == 0
    assert set(prompts) == {"Mine."}


def test_python_does_too(run, prompts):
    (row,) = gem.generate(run / "model", "Hello?", max_completion_length=4)
    assert row["prompt"] == "Hello?" and set(prompts) == {"Write a poem."}
    assert SYSTEM_PROMPT not in prompts and DIRECT_SYSTEM_PROMPT not in prompts


def test_weights_have_the_dtype_that_is_asked_for(run, tmp_path, monkeypatch, capsys):
    command = ["score", run / "model", run / "pairs.jsonl"]
    rows = {}
    for dtype in ("float32", "bfloat16", "auto"):
        code, out, err = call([*command, "--dtype", dtype], monkeypatch, capsys)
        assert code == 0, err
        rows[dtype] = [json.loads(line)["features"]["mean_logprob"] for line in out.splitlines()]
    assert rows["auto"] == rows["float32"] != rows["bfloat16"]  # auto on a CPU
    assert rows["bfloat16"] == pytest.approx(rows["float32"], rel=0.1)
    code, _, err = call([*command, "--dtype", "float8"], monkeypatch, capsys)
    assert code == 2 and "dtype: expected one of float32, bfloat16, auto" in err and err.count("\n") == 1


def test_auto_is_the_models_own_dtype_on_a_gpu():
    config = tiny_model().config
    for dtype, found in ((torch.bfloat16, "bfloat16"), (torch.float16, "float32"), (torch.float32, "float32")):
        config.dtype = dtype
        assert own_dtype(config, "cuda:1") == found and own_dtype(config, "cpu") == "float32"
