"""Runs that are killed, signalled, starved of disk, damaged, raced and moved at random, and continued.

    python -m tests.faults.storm --minutes 5 --seed 0

Each case is a run of one configuration: up to four faults, one after the other, each drawn with its moment from the
seed, and --resume after each. At the end the run must equal an unbroken one to the bit: every number of metrics.jsonl
but the times, completions.jsonl, and the weights. On the way every exit code must be one that docs/reliability.md
names, with one line for it and never a traceback. Exits with 1 at the first case where that does not hold, and keeps
its folder. As root the runs are on a tmpfs, whose size a fault cuts; elsewhere a process may write files of a certain
size only.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
import yaml

from gem.checkpoint import states
from gem.demo.arithmetic import arithmetic_pairs
from gem.files import write_jsonl
from tests import processes
from tests.helpers import save_tiny

RUN = {
    "num_generations": 2, "max_completion_length": 5, "max_steps": 5, "prompts_per_step": 2, "micro_batch_size": 1,
    "sft_epochs": 1, "sft_batch_size": 4, "sft_learning_rate": 3e-3, "learning_rate": 1e-3, "eval_generate": 1,
    "eval_sample": 1, "system_prompt": "Think.", "device": "cpu", "save_steps": 2, "log_completions_steps": 2,
    "gate": "off",
}  # fmt: skip
CONFIGURATIONS = {
    "SFT, SEGA with KL and clipping": {"beta": 0.1, "num_iterations": 2, "epsilon": 0.2, "lr_schedule": "linear"},
    "LoRA with dropout": {"use_peft": True, "lora_r": 4, "lora_dropout": 0.3, "save_total_limit": 3},
    "rollback to the best weights": {"guards": "rollback", "eval_steps": 2, "guard_kl": 0.02, "save_steps": 1},
    "safe, with SEGA": {
        "preset": "safe",
        "objective": "sega",
        "num_generations": 2,
        "save_steps": 1,
        "mask_truncated": False,
        "calibration_generations": 2,
    },
}
TIMES = ("step_time", "eval/seconds")
FAULTS = ("kill", "kill", "signal", "signal", "signal twice", "full disk", "damage", "race", "move", "read-only")
CODES = {0, 2, *(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))}


class Wrong(Exception):
    """What does not hold."""


class Storm:
    """The folder of the runs, the unbroken runs in it, and the counts."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.mounted = False
        self.deck: list[str] = []
        self.seconds: dict[str, float] = {}  # of the unbroken run of each configuration

    # One process

    def start(self, name: str, run: str, *flags: str, most_bytes: int | None = None) -> processes.Fork:
        path = self.folder / f"{run}.yaml"
        paths = {"model": "model", "train_file": "pairs.jsonl", "output_dir": f"disk/{run}"}
        places = {key: str(self.folder / place) for key, place in paths.items()}
        path.write_text(yaml.safe_dump({**RUN, **CONFIGURATIONS[name], **places}))
        return processes.Fork(limited_gem, most_bytes, "train", path, *flags)

    def end(self, fork: processes.Fork, killed_by: tuple[int, ...] = ()) -> int:
        """The exit code, once it is known to be one that is promised, with its one line."""
        fork.wait(120)
        code, lines = fork.returncode, [line for line in fork.output.splitlines() if line.startswith("gem: ")]
        if code == -signal.SIGKILL and signal.SIGKILL in killed_by:
            return code
        if not fork.output and killed_by and code in (1, *(-number for number in killed_by)):
            return code  # it had not begun to be gem yet; 1 is how a fork's own start ends on SIGINT
        if -code in killed_by and ("gem: ended by" in fork.output or "\nRun: " in fork.output):
            return code  # a signal on its last steps out, after all was said
        if code not in CODES or "Traceback" in fork.output:
            raise Wrong(f"exit code {code}:\n{fork.output}")
        last = [line for line in lines if "the run ends after this step" not in line]
        if len(last) != (code != 0):
            raise Wrong(f"exit code {code} with {len(last)} lines for it:\n{fork.output}")
        self.counts[f"exit code {code}"] += 1
        return code

    def begin_or_resume(self, name: str, run: str, **more) -> processes.Fork:
        """With --resume where there is something to continue; where there is none yet, from the beginning."""
        run_dir = self.folder / "disk" / run
        if states.checkpoints(run_dir) or (run_dir / "model").is_dir():
            self.counts["resumed"] += 1
            return self.start(name, run, "--resume", **more)
        shutil.rmtree(run_dir, ignore_errors=True)
        return self.start(name, run, **more)

    # Faults: each leaves a run that is over, or can be resumed

    def inject(self, fault: str, name: str, run: str) -> str:
        """Returns the name of the run, which may have changed."""
        run_dir = self.folder / "disk" / run
        if fault in ("kill", "signal", "signal twice"):
            fork = self.begin_or_resume(name, run)
            self.wait_for_a_moment(fork, name, run_dir)
            self.strike(fork, fault)
        elif fault == "full disk":
            self.fill(name, run, run_dir)
        elif fault == "damage":
            self.damage(name, run, run_dir)
        elif fault == "race":
            self.race(name, run, run_dir)
        elif fault == "move":
            if not run_dir.is_dir():
                self.kill(name, run, run_dir)
            if run_dir.is_dir():
                run = f"{run}-moved"
                run_dir.rename(self.folder / "disk" / run)
        elif fault == "read-only":
            self.read_only(name, run, run_dir)
        self.counts[fault] += 1
        return run

    def wait_for_a_moment(self, fork: processes.Fork, name: str, run_dir: Path) -> None:
        """Anywhere in its life: one time in four by the clock, else by the lines it has written."""
        by_clock, last = self.random.random() < 0.25, len(rows(self.unbroken(name) / "metrics.jsonl"))
        moment, line = self.random.uniform(0, self.seconds[name]), self.random.randrange(last)
        begin, metrics = time.monotonic(), run_dir / "metrics.jsonl"
        while fork.returncode is None and time.monotonic() - begin < (moment if by_clock else 60):
            if not by_clock and metrics.exists() and metrics.read_bytes().count(b"\n") > line:
                break
            time.sleep(0.002)
        time.sleep(self.random.uniform(0, 0.1))  # a step takes less

    def kill(self, name: str, run: str, run_dir: Path) -> None:
        fork = self.begin_or_resume(name, run)
        self.wait_for_a_moment(fork, name, run_dir)
        self.strike(fork, "kill")

    def strike(self, fork: processes.Fork, fault: str) -> None:
        if fault == "kill":
            fork.kill()
            self.end(fork, (signal.SIGKILL,))
            return
        number = self.random.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        waits = [self.random.uniform(0.01, 0.3)] if fault == "signal twice" else []
        for wait in (0.0, *waits):
            time.sleep(wait)
            with contextlib.suppress(ProcessLookupError):
                if fork.returncode is None:
                    os.kill(fork.process.pid, number)
        code = self.end(fork, (number,))
        if code > 128 and code != 128 + number:
            raise Wrong(f"{signal.Signals(number).name} ended with {code}")

    def fill(self, name: str, run: str, run_dir: Path) -> None:
        if not self.mounted:
            fork = self.begin_or_resume(name, run, most_bytes=int(10 ** self.random.uniform(2, 6)))
        else:
            fork = self.begin_or_resume(name, run)
            self.wait_for_a_moment(fork, name, run_dir)
            used = shutil.disk_usage(self.folder / "disk").used
            self.remount(f"size={used // 1024 + 4 + int(10 ** self.random.uniform(0, 3))}k")
        code = self.end(fork)
        if self.mounted:
            self.remount("size=2g")
        if code == 2 and not any(word in fork.output for word in ("cannot", "is not whole")):
            raise Wrong(f"a full disk ended with:\n{fork.output}")
        self.counts["of those ended by the full disk"] += code == 2

    def damage(self, name: str, run: str, run_dir: Path) -> None:
        for _ in range(3):
            if not states.checkpoints(run_dir):
                self.kill(name, run, run_dir)
        found = states.checkpoints(run_dir)
        if not found or (run_dir / "model").is_dir():
            return
        path = self.random.choice(sorted(found[-1].iterdir()))
        data = bytearray(path.read_bytes())
        how = self.random.choice(("flip", "cut", "remove"))
        if how == "flip" and path.name != states.CHECKSUMS:
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            path.write_bytes(data)
        elif how == "cut":
            path.write_bytes(data[: self.random.randrange(len(data))])
        else:
            path.unlink()
        fork = self.start(name, run, "--resume")
        code = self.end(fork)
        if f"{found[-1].name} is broken" not in fork.output:
            raise Wrong(f"{how} of {path} was not noticed:\n{fork.output}")
        if code == 2 and len(found) == 1:
            shutil.rmtree(run_dir)  # as it says
        elif code:
            raise Wrong(f"a damaged checkpoint beside {len(found) - 1} whole ones ended with:\n{fork.output}")
        self.counts["of those noticed"] += 1

    def race(self, name: str, run: str, run_dir: Path) -> None:
        """Two at once: one of them goes on, to its end or until it is killed; the other is told."""
        both = [self.begin_or_resume(name, run)]
        time.sleep(self.random.choice((0.0, self.random.uniform(0, 0.5))))
        both.append(self.start(name, run, *(["--resume"] if states.checkpoints(run_dir) else [])))
        if self.random.random() < 0.5:
            struck = both[self.random.randrange(2)]
            self.wait_for_a_moment(struck, name, run_dir)
            self.strike(struck, "kill")
        codes = [self.end(fork, (signal.SIGKILL,)) for fork in both]
        for fork, code in zip(both, codes):
            words = ("another process is training", "is not empty", "is complete", "no checkpoint", "no run in")
            if code == 2 and not any(word in fork.output for word in words):
                raise Wrong(f"the loser of a race heard:\n{fork.output}")
        if 0 not in codes and -signal.SIGKILL not in codes:
            raise Wrong(f"no one won a race: {codes}\n{both[0].output}\n{both[1].output}")
        self.counts["of those with a loser that was told"] += 2 in codes

    def read_only(self, name: str, run: str, run_dir: Path) -> None:
        if not self.mounted:
            return
        self.kill(name, run, run_dir)
        self.remount("ro")
        fork = self.start(name, run, *(["--resume"] if run_dir.is_dir() else []))
        code = self.end(fork)
        self.remount("rw")
        if code != 2:
            raise Wrong(f"a read-only folder ended with {code}:\n{fork.output}")

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder / "disk")], check=True)

    # Cases

    def unbroken(self, name: str) -> Path:
        path = self.folder / "disk" / f"unbroken-{list(CONFIGURATIONS).index(name)}"
        if not path.is_dir():
            begin = time.monotonic()
            if self.end(self.start(name, path.name)) != 0:
                raise Wrong(f"{name} does not run")
            self.seconds[name] = time.monotonic() - begin
        return path

    def draw(self) -> str:
        """From a shuffled deck of all faults: a short storm has each of them too."""
        if not self.deck:
            self.deck = list(FAULTS)
            self.random.shuffle(self.deck)
        return self.deck.pop()

    def case(self, number: int) -> None:
        name, draw = self.random.choice(list(CONFIGURATIONS)), self.random
        expected, run = self.unbroken(name), f"case-{number}"
        faults = [self.draw() for _ in range(draw.randint(1, 4))]
        print(f"case {number}: {name}: {', '.join(faults)}", flush=True)
        for fault in faults:
            if (self.folder / "disk" / run / "model").is_dir():
                break  # it came to its end before the last fault struck
            run = self.inject(fault, name, run)
        run_dir = self.folder / "disk" / run
        if not (run_dir / "model").is_dir() and self.end(fork := self.begin_or_resume(name, run)) != 0:
            raise Wrong(f"it cannot be continued:\n{fork.output}")
        if found := differences(expected, run_dir):
            raise Wrong(f"not the unbroken run: {', '.join(found)}")
        shutil.rmtree(run_dir)
        self.counts["cases equal to the bit"] += 1


def differences(one: Path, other: Path) -> list[str]:
    """What of two runs is not the same to the bit, but for the times; and what a run has left behind."""
    found = [name for name in ("metrics.jsonl", "completions.jsonl") if rows(one / name) != rows(other / name)]
    models = [{path.name: path.read_bytes() for path in (run / "model").glob("*.safetensors")} for run in (one, other)]
    if not models[0] or models[0] != models[1]:
        found.append("weights")
    return found + [path.name for path in other.glob(".*")]


def rows(path: Path) -> list[dict]:
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in row.items() if key not in TIMES} for row in found]


def limited_gem(most_bytes: int | None, *arguments: object) -> None:
    """`gem` in a fork; with most_bytes a write beyond so many bytes of a file fails."""
    if most_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    processes.gem(*arguments)


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[bool]:
    """A tmpfs at folder/disk where that is allowed, else a directory; True: its size can be changed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", str(folder)]
    allowed = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield allowed
    finally:
        if allowed:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.storm", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="gem-storm-"))
    save_tiny(folder / "model")
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(10))
    storm, end, number = Storm(folder, arguments.seed), time.monotonic() + 60 * arguments.minutes, 0
    with disk(folder / "disk") as storm.mounted:
        try:
            while time.monotonic() < end:
                number += 1
                storm.case(number)
        except (Wrong, AssertionError) as wrong:
            print(f"case {number} of seed {arguments.seed}: {wrong}\nIts files: {folder}", file=sys.stderr)
            if storm.mounted:
                shutil.copytree(folder / "disk", folder / "kept", dirs_exist_ok=True)
            return 1
    shutil.rmtree(folder)
    on = "a tmpfs" if storm.mounted else "a directory"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"seed {arguments.seed}, {arguments.minutes:g} minutes on {on}, one thread; {versions}")
    for name, count in sorted(storm.counts.items()):
        print(f"{count:5d}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
