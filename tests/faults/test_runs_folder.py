"""A run's folder that someone else has made, that two processes want, or that is damaged: one line, nothing outside."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import signal
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from gem import files
from gem.checkpoint import folder, states
from gem.checkpoint.folder import RunFolder, refuse_links
from gem.errors import Interrupted, UserError
from gem.files import write_lines
from gem.interrupt import Interrupt, end_with_a_line
from gem.model import checks
from gem.run.tracking import JsonLines

TENSORS = {"w": torch.arange(64.0)}
STATE = {
    "version": states.VERSION, "progress": {"step": 2, "total_steps": 4, "best": None, "stage": "SFT"}, "data": "d",
    "stage_state": {"name": "SFT", "trainer": {"num_steps": 2, "bad_steps": 0}}, "score": "None", "random": [{}],
    "offsets": {"metrics.jsonl": 10}, "machine": {},
}  # fmt: skip


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def run_dir(tmp_path):
    """A folder with two checkpoints, the newer of which needs other weights beside it."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text("seed: 0\n")
    states.save_state(path / "best-3", TENSORS, {"x": 1})
    for step, needs in ((2, []), (4, ["best-3"])):
        progress = {**STATE["progress"], "total_steps": step}
        states.save_checkpoint(path, step, TENSORS, {**STATE, "progress": progress}, 2, needs)
    return path


# Links and ids


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "config.yaml", "checkpoint-9", "tensorboard", "wandb", "x/y", "wandb/a", "debug.log"]
)
def test_a_link_in_a_run_is_refused(run_dir, tmp_path, name):
    outside = tmp_path / "precious"
    outside.mkdir()
    (run_dir / name).parent.mkdir(exist_ok=True)
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).symlink_to(outside)
    with pytest.raises(UserError, match=r"is a symbolic link, and none is followed"):
        refuse_links(run_dir)


def test_a_pipe_is_refused_and_wandbs_own_links_are_not(run_dir):
    (run_dir / "wandb").mkdir()
    (run_dir / "wandb" / "latest-run").symlink_to("run-1")
    (run_dir / "wandb" / "debug.log").symlink_to("/nowhere")
    logs = run_dir / "wandb" / "offline-run-1" / "logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to("/nowhere")
    refuse_links(run_dir)
    os.mkfifo(run_dir / "metrics.jsonl")  # to open it would wait for ever
    with pytest.raises(UserError, match=r"metrics\.jsonl is neither a file nor a directory"):
        refuse_links(run_dir)


@pytest.mark.parametrize("text", ["a/../../../precious", "..", "*", "a b", "", "x" * 65, "\x1b[2J", "id\x00", "ä"])
def test_an_id_that_could_be_a_path_is_refused(tmp_path, text):
    (tmp_path / "wandb_id").write_text(text)
    with pytest.raises(UserError, match="holds no id of a run"):
        folder.read_id(tmp_path / "wandb_id")


def test_ids_of_services_are_read(tmp_path):
    (tmp_path / "trackio_id").write_text("3f2a0c4be1d24d6f9b0c1a2b3c4d5e6f\n")
    assert folder.read_id(tmp_path / "trackio_id") == "3f2a0c4be1d24d6f9b0c1a2b3c4d5e6f"
    assert folder.read_id(tmp_path / "none") is None


def test_resuming_with_a_crafted_wandb_id_deletes_nothing(tmp_path, monkeypatch):
    import sys
    import types

    from gem.config.read import build_config
    from gem.run import tracking

    started = []
    fake = types.SimpleNamespace(init=lambda **_: started.append(1), Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "precious").mkdir()
    (tmp_path / "run" / "wandb" / "offline-run-1-a").mkdir(parents=True)
    (tmp_path / "run" / "wandb_id").write_text("a/../../../precious")
    config = build_config({"model": "m", "train_file": "t", "output_dir": "o"})
    with pytest.raises(UserError, match="holds no id of a run"):
        tracking._open_sink("wandb", config, tmp_path / "run", True)
    assert (tmp_path / "precious").is_dir() and not started


def test_metrics_are_never_written_through_a_link_nor_cut_under_another_name(tmp_path):
    precious = tmp_path / "precious.txt"
    precious.write_text("do not cut")
    (tmp_path / "metrics.jsonl").symlink_to(precious)
    with pytest.raises(UserError, match="cannot write"):
        JsonLines(tmp_path / "metrics.jsonl")
    os.link(precious, tmp_path / "hard.jsonl")
    file = JsonLines(tmp_path / "hard.jsonl", 2)
    file.write({"step": 1})
    file.close()
    assert precious.read_text() == "do not cut" and (tmp_path / "hard.jsonl").read_text() == 'do{"step": 1}\n'


def test_an_index_that_names_a_pickle_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    from gem.model.load import load_model, load_model_config
    from gem.model.source import find_model
    from tests.helpers import save_tiny

    model = save_tiny(tmp_path / "model")
    weights = model / "model.safetensors"
    names = list(load_file(weights))
    weights.unlink()
    (model / "weights.bin").write_bytes(pickle.dumps(Bomb()))
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "weights.bin")}))
    source = find_model(str(model))
    with pytest.raises(UserError, match=r"index\.json names weights\.bin: weights are read from \.safetensors"):
        load_model(source, load_model_config(source), device="cpu")
    assert not (tmp_path / "ran").exists()
    for text in ("[]", "{", json.dumps({"weight_map": {"w": "../x.safetensors"}})):
        index.write_text(text)
        with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
            checks.check_index(index, "m")
    for name in ("x.bin", "../x.safetensors", 3):
        with pytest.raises(UserError, match=r"transformers_weights: expected a \.safetensors file"):
            checks.check_weights_file(name, "m")


# Checksums and versions


def flip_a_bit(path, at=-20):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: flip_a_bit(d / "model.safetensors"), "model.safetensors is not what was written"),
        (lambda d: flip_a_bit(d / "state.pt"), "state.pt is not what was written"),
        (lambda d: (d / "state.pt").write_bytes(b"half"), "state.pt has 4 bytes, not the"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors cannot be read"),
        (lambda d: (d / "checksums.json").unlink(), "checksums.json cannot be read"),
        (lambda d: (d / "checksums.json").write_text("[1"), "checksums.json cannot be read"),
        (lambda d: flip_a_bit(d.parent / "best-3" / "state.pt"), "best-3/state.pt is not what was written"),
    ],
)
def test_a_broken_checkpoint_is_named_and_the_one_before_is_taken(run_dir, damage, words):
    assert states.newest_whole(run_dir) == (run_dir / "checkpoint-4", [])
    damage(run_dir / "checkpoint-4")
    path, broken = states.newest_whole(run_dir)
    assert path.name == "checkpoint-2" and len(broken) == 1
    assert broken[0].startswith("checkpoint-4 is broken: ") and words in broken[0]
    flip_a_bit(run_dir / "checkpoint-2" / "state.pt")
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole: checkpoint-4 is broken: .*; checkpoint-2 is"):
        states.newest_whole(run_dir)


def test_every_bit_of_a_checkpoint_counts(run_dir):
    """A flip anywhere in the files is found, whatever safetensors and zip make of it."""
    for name in ("model.safetensors", "state.pt"):
        path = run_dir / "checkpoint-4" / name
        whole = path.read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 40)):
            flip_a_bit(path, at)
            assert name in states.what_is_broken(path.parent)
            path.write_bytes(whole)
    assert states.what_is_broken(run_dir / "checkpoint-4") is None


def test_weights_that_an_older_checkpoint_needs_are_kept(run_dir):
    states.remove_others(run_dir, "best-*", states.needed_directories(run_dir))
    assert (run_dir / "best-3").is_dir()
    files.remove_directory(run_dir / "checkpoint-4")
    states.remove_others(run_dir, "best-*", states.needed_directories(run_dir))
    assert not (run_dir / "best-3").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 1}, "is of format 1, and this gem reads format 2"),
        ({"version": "2"}, "is of format '2'"),
        ({"progress": {**STATE["progress"], "step": -1}}, "step: expected a whole number, not negative, got -1"),
        ({"progress": {**STATE["progress"], "total_steps": True}}, "total_steps: expected a whole number"),
        ({"progress": {**STATE["progress"], "total_steps": 5}}, "total_steps is 5, which is not what the directory"),
        ({"progress": {**STATE["progress"], "best": "../../precious"}}, "best: expected the name of a directory"),
        ({"progress": None}, "it holds no state of a run"),
        ({"stage_state": {"trainer": {"num_steps": -3}}}, "num_steps: expected a whole number, not negative, got -3"),
        ({"offsets": {"metrics.jsonl": -1}}, "offset of metrics.jsonl: expected a whole number"),
    ],
)
def test_a_state_that_cannot_be_is_refused(tmp_path, change, words):
    states.check_state(tmp_path / "checkpoint-4", STATE)
    with pytest.raises(UserError) as error:
        states.check_state(tmp_path / "checkpoint-4", {**STATE, **change})
    assert words in one_line(error) and "checkpoint-4" in one_line(error)


def test_a_checkpoint_of_another_version_is_refused(run_dir):
    path = run_dir / "checkpoint-4" / "checksums.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 3'))
    with pytest.raises(UserError, match="is of format 3, and this gem reads format 2"):
        states.newest_whole(run_dir)


def test_names_that_are_no_checkpoints_are_left_alone(run_dir):
    for name in ("checkpoint-" + "9" * 100, "checkpoint-٣", "checkpoint-"):
        (run_dir / name).mkdir()
    assert [path.name for path in states.checkpoints(run_dir)] == ["checkpoint-2", "checkpoint-4"]


# A full disk, a folder that cannot be written


@contextmanager
def files_of_at_most(size):
    """A write beyond so many bytes of a file fails, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 100, 1000, 3000, 5000, 20_000, 80_000])
def test_a_checkpoint_that_does_not_fit_is_one_line_and_leaves_nothing(run_dir, size):
    before = sorted(run_dir.rglob("*"))
    moments = {"moments": torch.zeros(20_000), "more": [torch.ones(500) for _ in range(9)]}
    with files_of_at_most(size), pytest.raises(UserError) as error:
        states.save_checkpoint(run_dir, 6, {"w": torch.zeros(2000)}, {**STATE, **moments}, 2)
    words = one_line(error)
    assert "cannot save" in words and "the last good checkpoint is checkpoint-4" in words and "--resume" in words
    assert "inline_container" not in words and sorted(run_dir.rglob("*")) == before


def test_metrics_that_do_not_fit_are_one_line(run_dir):
    file = JsonLines(run_dir / "metrics.jsonl")
    with files_of_at_most(100):
        with pytest.raises(UserError, match=r"metrics\.jsonl: File too large; the last good checkpoint is"):
            for step in range(99):
                file.write({"step": step})
        file.close()  # nothing is left over that closing would write


def test_tensorboard_on_a_full_disk_prints_no_trace_of_its_thread(tmp_path, capfd):
    import threading

    from gem.run.tracking import _TensorBoard

    before = threading.excepthook
    service = _TensorBoard(None, tmp_path, False)
    with files_of_at_most(500), pytest.raises(OSError, match="File too large"):
        for step in range(999):
            service.write({"loss": 1.0}, step)
            service.writer.flush()
    with pytest.raises(OSError, match="File too large"):
        service.close(True)
    assert "Traceback" not in capfd.readouterr().err and threading.excepthook is before


def test_scores_that_do_not_fit_leave_nothing(tmp_path):
    with files_of_at_most(50), pytest.raises(UserError, match=r"--out: cannot write .*File too large"):
        write_lines(tmp_path / "scores.jsonl", ("x" * 30 + "\n" for _ in range(999)), "--out: cannot write")
    with pytest.raises(ZeroDivisionError):  # what the rows raise is not the disk's
        write_lines(tmp_path / "scores.jsonl", (str(1 / 0) for _ in range(1)), "--out: cannot write")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"cannot write .*No such file or directory"):
        write_lines(tmp_path / "none" / "x", ["a"])


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO])
def test_an_error_of_the_disk_names_the_last_good_checkpoint(run_dir, number):
    from gem.loop import places_named

    with pytest.raises(UserError) as error, places_named(run_dir):
        raise OSError(number, os.strerror(number), str(run_dir / "trackio_id"))
    assert os.strerror(number) in one_line(error) and "the last good checkpoint is checkpoint-4" in one_line(error)
    with pytest.raises(ConnectionResetError), places_named(run_dir):  # not the disk's
        raise ConnectionResetError(errno.ECONNRESET, "reset")


def test_the_configuration_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, type(tmp_path).replace
    monkeypatch.setattr("os.fsync", lambda number: (done.append("flushed"), fsync(number))[1])
    monkeypatch.setattr(type(tmp_path), "replace", lambda a, b: (done.append("named"), replace(a, b))[1])
    write_lines(tmp_path / "config.yaml", ["seed: 0\n"])
    assert done == ["flushed", "named", "flushed"] and (tmp_path / "config.yaml").read_text() == "seed: 0\n"


# Two processes in one folder


def test_one_process_at_a_time(tmp_path):
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.begin()
    for attempt in (second.begin, second.take):
        with pytest.raises(UserError, match=r"another process is training in .*run; wait for it, or give another"):
            attempt()
    second.undo()
    (tmp_path / "run" / "config.yaml").write_text("a")
    assert (tmp_path / "run").is_dir()
    first.close()
    with pytest.raises(UserError, match="is not empty"):  # the other one has ended between its check and its beginning
        second.begin()
    assert (tmp_path / "run" / "config.yaml").is_file()
    second.take()
    second.close()


def test_what_could_not_begin_is_taken_back(tmp_path):
    run = RunFolder(tmp_path / "a" / "b" / "run")
    run.begin()
    (run.path / "wandb").mkdir()
    (run.path / "config.yaml").write_text("a")
    run.undo()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    run = RunFolder(tmp_path / "empty")
    run.begin()
    (run.path / "config.yaml").write_text("a")
    run.undo()
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"] and not list(run.path.iterdir())


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_a_wish_and_the_second_an_order(number, capfd):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with Interrupt() as interrupt:
        assert interrupt.signal is None
        signal.raise_signal(number)
        assert interrupt.signal == number
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and number.name in said and "with a checkpoint" in said
        with pytest.raises(Interrupted) as ended:
            signal.raise_signal(number)
        assert ended.value.exit_code == 128 + number and number.name in str(ended.value)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_one_ctrl_c_that_torchrun_hands_on_is_one(monkeypatch, capfd):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    interrupt = Interrupt()
    interrupt.take(signal.SIGINT)
    now[0] += 1
    interrupt.take(signal.SIGINT)
    now[0] += 2
    with pytest.raises(Interrupted):
        interrupt.take(signal.SIGTERM)


def test_outside_a_training_sigterm_is_a_line_and_an_ignored_sighup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with end_with_a_line():
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(Interrupted) as ended:
                signal.raise_signal(signal.SIGTERM)
            with Interrupt() as interrupt:
                signal.raise_signal(signal.SIGHUP)
            assert interrupt.signal is None
        assert ended.value.exit_code == 143 and str(ended.value) == "ended by SIGTERM"
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_ended_says_so_in_one_line(monkeypatch, capsys, number):
    """typer catches KeyboardInterrupt and exits with 130 in silence."""
    from gem import cli

    monkeypatch.setattr("sys.argv", ["gem", "config"])
    monkeypatch.setattr(cli, "commented_config", lambda preset: signal.raise_signal(number))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 128 + number and capsys.readouterr().err == f"gem: ended by {number.name}\n"
    assert (
        signal.getsignal(number) == signal.SIG_DFL
    )  # one more ends it at once, without a trace from the exit's own work
