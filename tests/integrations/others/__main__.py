"""python -m tests.integrations.others verl [openrlhf ...]

Makes an environment in .others/NAME with the trainer of the version that the adapter is written for, torch as in
constraints.txt and the few packages that the trainer's modules import; then runs NAME.py of this folder there. On a
machine without a GPU set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu first.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
# Trainer -> (installed without what it requires, installed with it, environment variables).
TRAINERS = {
    "verl": (
        "verl==0.9.1",
        """tensordict==0.10.0 transformers==5.9.0 hydra-core==1.3.* ray==2.60.0 TransferQueue==0.1.11 accelerate
        cachetools codetiming datasets dill fastapi pandas peft pyarrow tensorboard torchdata uvicorn""",
        {"VERL_USE_EXTERNAL_PLUGINS": "gem_kernels"},
    ),
    "openrlhf": (
        "openrlhf==0.11.2",
        "transformers==5.15.0 accelerate datasets einops jsonlines peft pylatexenc sympy torchdata tqdm",
        {"TORCH_COMPILE_DISABLE": "1"},
    ),
    "prime_rl": ("", "", {}),  # from a clone: PRIME_RL
    "axolotl": (
        "axolotl==0.19.0",
        """transformers==5.16.1 peft==0.20.0 accelerate==1.13.0 datasets==4.8.4 trl==1.9.0 addict pydantic==2.12.5""",
        {},
    ),
}


def pinned(name: str) -> str:
    return re.search(rf"^{name}==.+$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)[0]


def environment(name: str) -> Path:
    """The Python of .others/NAME, made on first use."""
    folder = ROOT / ".others" / name
    python, done = folder / "bin" / "python", folder / ".installed"
    alone, rest, _ = TRAINERS[name]
    wanted = " ".join([pinned("torch"), *alone.split(), *rest.split()])
    if not done.exists() or done.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
        subprocess.run([*pip, pinned("torch"), "setuptools", *rest.split()], check=True)
        if alone:
            subprocess.run([*pip, "--no-deps", *alone.split()], check=True)
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", "-e", ROOT], check=True)
        done.write_text(wanted)
    return python


def main(names: list[str]) -> int:
    if not names or set(names) - set(TRAINERS):
        print(f"usage: python -m tests.integrations.others {' | '.join(TRAINERS)}", file=sys.stderr)
        return 2
    for name in names:
        command = [environment(name), "-m", f"tests.integrations.others.{name}"]
        settings = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **TRAINERS[name][2]}
        code = subprocess.run(command, cwd=ROOT, env=os.environ | settings).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
