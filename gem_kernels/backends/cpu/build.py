"""Compiles the C++ sources beside it on first use and keeps the library in a private cache folder.

Nothing happens at import. `load()` returns the library, or None where there is no working compiler; `reason()` then
says why, and one RuntimeWarning has said it. Environment:

    GEM_KERNELS_NO_COMPILE=1   never compile, never load: plain torch, without a warning
    GEM_KERNELS_CACHE          the cache folder; otherwise $XDG_CACHE_HOME/gem_kernels or ~/.cache/gem_kernels
    CXX                        the compiler; otherwise the first of c++, g++, clang++ that is found

A library is named by the hash of all that shaped it: source, flags, compiler and its version, and the features of this
CPU, so that a home folder shared by unlike machines is safe; and by the hash of its own bytes, which are compared
before they are loaded: a damaged file would end the process, so it is built again. It is built in a temporary file and
renamed, so any number of processes may build at once. The folder is created with mode 0700. A folder or a library that
another user owns or may write to is refused, since what lies there would be run.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

SOURCES = tuple(Path(__file__).with_name(name) for name in ("row_stats.cpp", "span_scores.cpp"))
INCLUDED = (Path(__file__).with_name("row_extra.h"),)
FUNCTIONS = ("gem_row_stats_forward", "gem_row_stats_backward", "gem_span_scores")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
COMPILE_TIMEOUT_SECONDS = 300

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_reason: str | None = None
_tried = False


class BuildError(RuntimeError):
    """The library could not be built or loaded; the message is what `reason()` returns."""


def load() -> ctypes.CDLL | None:
    """The compiled library, built if need be; None (see `reason`) where that is not possible. Safe from any thread."""
    global _library, _reason, _tried
    if disabled():
        return None
    if _tried:
        return _library
    _survive_forks()
    with _lock:
        if not _tried:
            try:
                _library = _build_and_open()
            except (RuntimeError, OSError, AttributeError, subprocess.SubprocessError) as error:
                _reason, _tried = f"{error}", True
                warnings.warn(
                    f"gem_kernels: the compiled CPU kernels are not available, plain torch is used instead ({_reason})",
                    RuntimeWarning,
                    stacklevel=2,
                )
            _tried = True
    return _library


_registered = False


def _survive_forks() -> None:
    """A child forked while another thread builds would wait for a thread that it does not have."""
    global _registered
    if not _registered and hasattr(os, "register_at_fork"):
        _registered = True
        os.register_at_fork(after_in_child=_new_lock)


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


def reason() -> str | None:
    """Why `load()` returned None; None if it did not, or was not called yet."""
    return "GEM_KERNELS_NO_COMPILE is set" if disabled() else _reason


def disabled() -> bool:
    """Whether the environment forbids compiled code."""
    return os.environ.get("GEM_KERNELS_NO_COMPILE", "0") not in ("", "0")


def cache_folder() -> Path:
    """Where libraries are kept; not created here."""
    if folder := os.environ.get("GEM_KERNELS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gem_kernels"


def find_compiler() -> list[str]:
    """The compiler command ($CXX may hold options of its own)."""
    given = os.environ.get("CXX", "")
    try:
        chosen = shlex.split(given)
    except ValueError as error:
        raise BuildError(f"CXX={given!r} is not a command: {error}") from error
    if chosen:
        if shutil.which(chosen[0]):
            return chosen
        raise BuildError(f"CXX={chosen[0]!r} is not found")
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("no C++ compiler found: tried $CXX, c++, g++, clang++")


def read_sources() -> bytes:
    return b"\0".join(path.read_bytes() for path in (*SOURCES, *INCLUDED))


def _build_and_open() -> ctypes.CDLL:
    if sys.platform == "win32":
        raise BuildError("not supported on Windows")
    compiler = find_compiler()
    source = read_sources()
    folder = _private_folder(cache_folder())
    name = f"kernels-{_key(source, compiler)}"
    for path in sorted(folder.glob(f"{name}-*.so")):
        try:
            _check_owner(path, path.stat())
            if _digest(path) == path.stem.rpartition("-")[2]:
                return _open(path)
        except FileNotFoundError:  # another process found it damaged too
            continue
        except (OSError, AttributeError):
            pass
        path.unlink(missing_ok=True)  # damaged or foreign: build it again
    return _open(_compile(compiler, folder, name))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def _private_folder(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise BuildError(f"no cache folder, set GEM_KERNELS_CACHE: {error}") from error
    _check_owner(folder, status)
    if not writable:
        raise BuildError(f"cache folder {folder} is not writable, set GEM_KERNELS_CACHE")
    return folder


def _check_owner(path: Path, status: os.stat_result) -> None:
    """A mode can be mended, what others have put there cannot: so the advice is to remove the folder."""
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022:
        folder = path if path.is_dir() else path.parent
        raise BuildError(f"{path} is not private to this user: remove the folder {folder}, or set GEM_KERNELS_CACHE")


def _key(source: bytes, compiler: list[str]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=COMPILE_TIMEOUT_SECONDS)
    parts = [source, " ".join(FLAGS).encode(), " ".join(compiler).encode(), version.stdout, _cpu_features().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _cpu_features() -> str:
    """What -march=native may depend on."""
    features = [platform.system(), platform.machine(), platform.processor()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
        seen = set()
        for line in cpuinfo:
            name = line.split(":")[0].strip()
            if name in ("model name", "flags", "Features", "isa", "CPU part") and name not in seen:
                seen.add(name)
                features.append(line.strip())
    return "\n".join(features)


def _compile(compiler: list[str], folder: Path, name: str) -> Path:
    """-> the library, in `folder`, named by its digest too."""
    handle, temporary = tempfile.mkstemp(suffix=".so", prefix=".build-", dir=folder)
    os.close(handle)
    try:
        # Some compilers know no -march=native for their target: then without.
        attempts = [FLAGS, tuple(flag for flag in FLAGS if flag != "-march=native")]
        for flags in attempts:
            command = [*compiler, *flags, *map(str, SOURCES), "-o", temporary]
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=COMPILE_TIMEOUT_SECONDS
            )
            if done.returncode == 0:
                path = folder / f"{name}-{_digest(Path(temporary))}.so"
                os.replace(temporary, path)
                return path
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise BuildError(f"{shlex.join(command)} exited with {done.returncode}: {' | '.join(lines[:3])}")
    finally:
        Path(temporary).unlink(missing_ok=True)


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))  # CDLL calls release the interpreter lock
    for name in FUNCTIONS:
        function = getattr(library, name)
        function.argtypes = [ctypes.c_void_p]
        function.restype = None
    return library
