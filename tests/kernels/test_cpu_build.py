"""How the compiled CPU kernels are built: once, by one compiler, into a folder that no one else may write to."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading

import pytest
import torch

from gem_kernels.backends.cpu import build
from tests.kernels.test_cpu_kernels import (
    DTYPES,
    HAS_COMPILER,
    _poisoned_empty,  # noqa: F401
    check,
    check_conversions,
    forward,
    problem,
)

# A library of its own functions, each of which does nothing: compiled in a tenth of the time.
EMPTY = "\n".join(f'extern "C" void {name}(void*) {{}}' for name in build.FUNCTIONS)


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    """build.py as at import, with an empty cache folder."""
    monkeypatch.setenv("GEM_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GEM_KERNELS_NO_COMPILE", raising=False)
    for name, value in (("_library", None), ("_reason", None), ("_tried", False)):
        monkeypatch.setattr(build, name, value)
    return tmp_path / "cache"


@pytest.fixture
def empty_source(monkeypatch, tmp_path):
    """What is built when only the building is looked at, not what the library computes."""
    source = tmp_path / "empty.cpp"
    source.write_text(EMPTY)
    monkeypatch.setattr(build, "SOURCES", (source,))
    return source


@pytest.fixture
def slow_compiler(monkeypatch, tmp_path):
    """One that takes its time, so that all who build at once overlap."""
    script = tmp_path / "slow_compiler"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] || sleep 0.5\nexec {shlex.join(build.find_compiler())} "$@"\n')
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))


def test_no_compiler_falls_back_with_one_warning(fresh_build, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    logits, targets = problem(1, 3, 100)
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler found") as caught:
        got = [forward(logits, targets, compiled=True) for _ in range(2)]
    assert len(caught) == 1 and "no C++ compiler" in build.reason()
    assert torch.equal(got[0][0], forward(logits, targets, compiled=False)[0])
    assert torch.equal(got[0][0], got[1][0])


def test_failed_build_says_what_the_compiler_said(fresh_build, monkeypatch, tmp_path):
    source = tmp_path / "broken.cpp"
    source.write_text("this is not C++;")
    monkeypatch.setattr(build, "SOURCES", (source,))
    with pytest.warns(RuntimeWarning, match="plain torch is used"):
        assert build.load() is None
    assert build.reason()
    assert not fresh_build.exists() or not list(fresh_build.iterdir()), "left something behind"


def test_environment_forbids_compiling(fresh_build, monkeypatch, recwarn):
    monkeypatch.setenv("GEM_KERNELS_NO_COMPILE", "1")
    logits, targets = problem(1, 3, 100)
    forward(logits, targets, compiled=True)
    assert build.load() is None and "NO_COMPILE" in build.reason()
    assert not fresh_build.exists() and not recwarn.list


def test_refuses_a_folder_others_may_write_to(fresh_build):
    fresh_build.mkdir()
    fresh_build.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="not private"):
        assert build.load() is None


@pytest.mark.skipif(not HAS_COMPILER, reason="no compiler")
def test_threads_that_build_at_once_build_once(fresh_build, empty_source, slow_compiler, monkeypatch):
    compiled, libraries = [], []
    original = build._compile
    monkeypatch.setattr(build, "_compile", lambda *args: (compiled.append(args), original(*args))[1])
    threads = [threading.Thread(target=lambda: libraries.append(build.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1 and len(set(map(id, libraries))) == 1 and libraries[0] is not None
    assert len(list(fresh_build.iterdir())) == 1 and fresh_build.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(not HAS_COMPILER, reason="no compiler")
def test_processes_that_build_at_once(fresh_build, empty_source, slow_compiler):
    """build.py needs no torch, so it is run by itself."""
    code = (
        "import pathlib, runpy, sys; load = runpy.run_path(sys.argv[1])['load'];"
        "load.__globals__['SOURCES'] = [pathlib.Path(sys.argv[2])]; assert load() is not None"
    )
    command = [sys.executable, "-W", "error", "-c", code, build.__file__, str(empty_source)]
    for process in [subprocess.Popen(command) for _ in range(3)]:
        assert process.wait(timeout=600) == 0
    assert len(list(fresh_build.iterdir())) >= 1


@pytest.mark.skipif(not HAS_COMPILER, reason="no compiler")
def test_a_damaged_library_is_built_again(fresh_build, empty_source, monkeypatch):
    """Whatever is damaged in it: the loader would end the process, at once or at the first call."""
    assert build.load() is not None
    (library,) = fresh_build.iterdir()
    whole = library.read_bytes()
    middle = len(whole) // 2
    for damaged in (b"truncated", whole[:middle], whole[:middle] + b"\xff" * 4096 + whole[middle + 4096 :]):
        assert damaged != whole
        library.unlink()  # not in place: it is mapped into this process
        library.write_bytes(damaged)
        monkeypatch.setattr(build, "_tried", False)
        assert build.load() is not None
        (library,) = fresh_build.iterdir()
        assert build._digest(library) == library.stem.rpartition("-")[2]


@pytest.mark.skipif(not HAS_COMPILER, reason="no compiler")
def test_a_library_that_others_may_write_to_is_refused(fresh_build, empty_source, monkeypatch):
    assert build.load() is not None
    (library,) = fresh_build.iterdir()
    library.chmod(0o666)
    monkeypatch.setattr(build, "_tried", False)
    monkeypatch.setattr(build, "_library", None)
    with pytest.warns(RuntimeWarning, match=r"is not private to this user: remove the folder .*cache, or set"):
        assert build.load() is None
    assert library.exists()


@pytest.mark.skipif(not HAS_COMPILER, reason="no compiler")
def test_a_library_of_another_user_is_refused(fresh_build, empty_source, monkeypatch):
    """The folder is ours, the file in it is not."""
    assert build.load() is not None
    original = build.Path.stat

    def of_another(path, **options):
        status = original(path, **options)
        fields = list(status)
        fields[4] += path.suffix == ".so"
        return os.stat_result(fields)

    monkeypatch.setattr(build.Path, "stat", of_another)
    monkeypatch.setattr(build, "_tried", False)
    monkeypatch.setattr(build, "_library", None)
    with pytest.warns(RuntimeWarning, match="not private"):
        assert build.load() is None


def test_a_stray_quote_in_cxx_is_one_line(fresh_build, monkeypatch):
    monkeypatch.setenv("CXX", "g++ '-O3")
    with pytest.warns(RuntimeWarning, match="CXX=.* is not a command: No closing quotation"):
        assert build.load() is None


@pytest.mark.skipif(not HAS_COMPILER or not hasattr(os, "fork"), reason="no compiler or no fork")
def test_a_fork_while_another_thread_compiles(fresh_build, empty_source, monkeypatch):
    compiling, go_on = threading.Event(), threading.Event()
    original = build._compile

    def slow(*args):
        compiling.set()
        assert go_on.wait(60)
        return original(*args)

    monkeypatch.setattr(build, "_compile", slow)
    thread = threading.Thread(target=build.load)
    thread.start()
    assert compiling.wait(60)
    child = os.fork()
    if child == 0:
        go_on.set()
        os._exit(0 if build._lock.acquire(timeout=5) else 1)
    go_on.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not HAS_COMPILER, reason="no compiler")
@pytest.mark.parametrize("machine", ["-march=x86-64", "-march=x86-64-v3"])
def test_narrower_vectors(machine, fresh_build, monkeypatch):
    """The code for machines without AVX-512, and without AVX, F16C and FMA, computes the same."""
    if os.uname().machine != "x86_64":
        pytest.skip("x86-64 flags")
    flags = tuple(machine if flag == "-march=native" else flag for flag in build.FLAGS)
    monkeypatch.setattr(build, "FLAGS", flags)
    if machine.endswith("v3") and "avx2" not in build._cpu_features():
        pytest.skip("this machine has no AVX2")
    for dtype in DTYPES:
        for softcap in (None, 5.0):
            check(*problem(1, 3, 5003, dtype), 0.7, softcap, compiled=True)
    for dtype in (torch.bfloat16, torch.float16):
        check_conversions(dtype)
