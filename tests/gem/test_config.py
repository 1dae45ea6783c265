"""Configuration: types, ranges, flags over file, nearest names, and the way back from the saved file."""

from pathlib import Path

import pytest

from gem.config.read import build_config, commented_config, config_text, load_command_line, load_config, parse_flags
from gem.config.settings import GuardSettings, Sampling, Scoring, TrainConfig
from gem.errors import UserError

NEEDED = {"model": "m", "train_file": "t.jsonl", "output_dir": "o"}


def test_flags_stand_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: m\ntrain_file: t.jsonl\noutput_dir: o\nmax_steps: 3\nlearning_rate: 1e-5\n")
    config = load_config(path, ["--max-steps", "7", "--mask_truncated=true", "--eval_file", "null", "--top_m=4"])
    assert config.max_steps == 7
    assert config.learning_rate == 1e-5  # YAML 1.1 reads 1e-5 as a string
    assert config.mask_truncated is True
    assert config.eval_file is None
    assert config.top_m == 4 and isinstance(config.top_m, int)


def test_a_command_has_its_config_anywhere_or_none(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: m\ntrain_file: t.jsonl\noutput_dir: o\nseed: 4\n")
    flags = ["--max_steps", "7", "--preset=safe"]
    expected = build_config({**NEEDED, "seed": 4, "max_steps": 7, "preset": "safe"})
    for words in ([str(path), *flags], [*flags, str(path)], [*flags[:2], str(path), *flags[2:]]):
        assert load_command_line(words) == expected
    alone = load_command_line([word for key, value in NEEDED.items() for word in (f"--{key}", value)])
    assert alone == build_config(NEEDED)
    with pytest.raises(UserError, match=r"one config.*'other.yaml'"):
        load_command_line([str(path), *flags, "other.yaml"])
    with pytest.raises(UserError, match="--seed: expected a value"):
        load_command_line([str(path), "--seed"])
    with pytest.raises(UserError, match=r"model.*--model"):
        load_command_line([])


def test_a_boolean_flag_may_stand_alone(tmp_path):
    """As with transformers' HfArgumentParser: what follows it is its value where it can be one."""
    path = tmp_path / "c.yaml"
    path.write_text("model: m\ntrain_file: t.jsonl\noutput_dir: o\n")
    for words in (
        ["--use_peft"],
        ["--use-peft", "true"],
        ["--use_peft", "YES"],
        ["--use_peft=on"],
        ["--use_peft", "1"],
    ):
        for line in ([str(path), *words], [*words, str(path)], [*words, "--seed", "3", str(path)]):
            assert load_command_line(line).use_peft is True, line
    for words in (["--mask_truncated", "false"], ["--mask_truncated=0"], ["--mask_truncated", "No"]):
        assert load_command_line(["--preset", "safe", *words, str(path)]).mask_truncated is False
    assert parse_flags(["--use_peft", "--seed", "3"]) == {"use_peft": True, "seed": 3}
    assert parse_flags(["--seed", "1", "--model", "yes"]) == {"seed": 1, "model": "yes"}
    with pytest.raises(UserError, match="use_peft: expected bool, got 'maybe'"):
        load_command_line([str(path), "--use_peft=maybe"])
    with pytest.raises(UserError, match="expected one config and then --key value, got 'maybe'"):
        load_command_line([str(path), "--use_peft", "maybe"])


def test_a_text_flag_stays_text():
    assert parse_flags(["--model", "1e3", "--answer_marker", "no"]) == {"model": "1e3", "answer_marker": "no"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lerning_rate": 1.0}, ["lerning_rate", "'learning_rate'"]),
        ({"max_steps": "many"}, ["max_steps", "int", "'many'"]),
        ({"max_steps": 2.5}, ["max_steps", "int", "2.5"]),
        ({"mask_truncated": "yes"}, ["mask_truncated", "bool", "'yes'"]),
        ({"loss_type": "avg"}, ["loss_type", "sum, mean, token, constant", "'avg'"]),
        ({"seed": True}, ["seed", "int", "True"]),
        ({"num_generations": 1}, ["num_generations", "2", "1"]),
        ({"temperature": -0.5}, ["temperature", "at least 0", "-0.5"]),
        ({"top_p": 1.5}, ["top_p", "at most 1", "1.5"]),
        ({"top_m": 1.5}, ["top_m", "1.5"]),
        ({"max_grad_norm": 0.0}, ["max_grad_norm", "more than 0", "0.0"]),
        ({"learning_rate": float("nan")}, ["learning_rate", "finite", "nan"]),
        ({"model": " "}, ["model", "--model"]),
    ],
)
def test_a_wrong_value_is_named(values, words):
    with pytest.raises(UserError) as error:
        build_config({**NEEDED, **values})
    for word in words:
        assert word in str(error.value)


def test_every_setting_survives_saving(tmp_path):
    config = build_config({**NEEDED, "top_m": 3, "eval_file": "e.jsonl", "learning_rate": 3e-6, "system_prompt": ""})
    (tmp_path / "c.yaml").write_text(config_text(config), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml") == config


def test_every_number_has_a_checked_range():
    """A new numeric setting without a range would let nonsense through: each refuses -1, lambda -1e6."""
    for name, field in TrainConfig.model_fields.items():
        if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            with pytest.raises(UserError, match=name):
                build_config({**NEEDED, name: type(field.default)(-1 if name != "fork_weight" else -1e6)})


def test_flags_need_values():
    with pytest.raises(UserError, match="--seed"):
        parse_flags(["--seed"])
    with pytest.raises(UserError, match="seed"):
        parse_flags(["seed", "1"])


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("a: [1,\n")
    with pytest.raises(UserError, match=r"c\.yaml"):
        load_config(path)
    with pytest.raises(UserError, match="missing"):
        load_config(tmp_path / "missing.yaml")


def test_every_setting_is_documented():
    for name, field in TrainConfig.model_fields.items():
        assert len(field.description) > 3, name
    assert "gem config" in (Path(__file__).parents[2] / "docs" / "training.md").read_text()


@pytest.mark.parametrize("preset", ["paper", "safe"])
def test_the_printed_config_reads_back_to_the_preset(preset, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(commented_config(preset))
    config = load_config(path, ["--model", "m", "--train_file", "t", "--output_dir", "o"])
    assert config == build_config({**NEEDED, "train_file": "t", "preset": preset})
    for name in TrainConfig.model_fields:
        assert f"\n{name}:" in "\n" + path.read_text()
    with pytest.raises(UserError, match="model"):
        load_config(path)


def test_a_preset_gives_defaults_that_the_file_and_flags_stand_over(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("preset: safe\nmodel: m\ntrain_file: t.jsonl\noutput_dir: o\nbeta: 0.5\n")
    config = load_config(path, ["--loss_type", "mean"])
    assert config.loss_type == "mean" and config.beta == 0.5
    assert config.mask_truncated is True and config.guards != "off"
    assert build_config(NEEDED) == build_config({**NEEDED, "preset": "paper"})
    with pytest.raises(UserError, match="paper, safe"):
        build_config({**NEEDED, "preset": "wild"})


def test_the_presets_say_what_is_asked_of_a_score():
    """`paper` trains on the published score and warns; `safe` asks the pairs first and never saves a worse model."""
    paper, safe = (build_config({**NEEDED, "preset": name}) for name in ("paper", "safe"))
    assert (paper.score, paper.gate, paper.keep_best, paper.guards) == ("paper", "warn", False, "off")
    assert (safe.score, safe.gate, safe.keep_best, safe.guards) == ("calibrated", "stop", True, "stop")
    assert (
        paper.uses_score and not paper.changed(objective="dpo").uses_score and not safe.changed(max_steps=0).uses_score
    )


def test_lists_of_names():
    assert build_config({**NEEDED, "report_to": "tensorboard,wandb"}).report_to == ("tensorboard", "wandb")
    for none in ("none", ["none"], "", []):
        assert build_config({**NEEDED, "report_to": none}).report_to == ()
    with pytest.raises(UserError, match=r"report_to: .*'none'"):
        build_config({**NEEDED, "report_to": "none,wandb"})
    spans = build_config({**NEEDED, "answer_span": ["boxed", "regex:a,b{2}", "last_tokens:8"]}).answer_span
    assert spans == ("boxed", "regex:a,b{2}", "last_tokens:8")
    assert build_config({**NEEDED, **parse_flags(["--answer_span=regex:x, y"])}).answer_span == ("regex:x, y",)
    for wrong in (["boxes"], ["last_tokens:0"], ["regex:("], 3, []):
        with pytest.raises(UserError, match="answer_span"):
            build_config({**NEEDED, "answer_span": wrong})


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"epsilon_high": 0.3}, "epsilon"),
        ({"load_in_4bit": True}, "use_peft"),
        ({"overlong_buffer": 300, "max_completion_length": 200}, "200"),
        ({"epsilon": -0.1}, "epsilon"),
    ],
)
def test_settings_that_need_each_other(values, word):
    with pytest.raises(UserError, match=word):
        build_config({**NEEDED, **values})


def test_off_without_quotes_is_off():
    assert build_config({**NEEDED, "guards": False}).guards == "off"  # YAML 1.1 reads off as false


SECTIONS = [base for base in TrainConfig.__mro__ if base.__module__ == TrainConfig.__module__]


def test_a_config_is_every_section_and_each_can_be_made_alone():
    config = build_config(NEEDED)
    assert len(SECTIONS) > 12 and all(isinstance(config, section) for section in SECTIONS)
    for section in SECTIONS:
        if section not in (TrainConfig,):
            alone = section()
            assert all(getattr(alone, name) == field.default for name, field in section.model_fields.items())
    assert Sampling(num_generations=1, temperature=0).temperature == 0.0
    assert isinstance(config.changed(beta=1), TrainConfig) and config.changed(beta=1).beta == 1.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TrainConfig(**NEEDED, learning_rate=-1), "learning_rate: expected at least 0, got -1"),
        (lambda: TrainConfig(learning_rate=1.0), "model: expected a value"),
        (lambda: Sampling(top_p=0), "top_p: expected more than 0, got 0"),
        (lambda: Sampling(tempreature=1.0), "unknown key 'tempreature'; did you mean 'temperature'?"),
        (lambda: Scoring(trim="median"), "trim: expected one of none, mad, rank, got 'median'"),
        (lambda: Scoring().changed(top_m=1.5), "top_m: expected a share up to 1.0"),
        (lambda: GuardSettings(guard_kl=float("inf")), "guard_kl: expected a finite number, got inf"),
    ],
)
def test_no_way_of_making_settings_goes_unchecked(make, words):
    with pytest.raises(UserError) as error:
        make()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_settings_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        build_config(NEEDED).beta = 1.0


def test_a_setting_of_several_sections_is_one():
    """The same default, meaning and range wherever it stands."""
    found = {}
    for section in SECTIONS:
        for name, field in section.model_fields.items():
            said = (field.annotation, field.default, field.description, field.json_schema_extra["limits"])
            assert found.setdefault(name, said) == said, name
