"""A mistake is told before torch and transformers are imported, which takes seconds; nothing is imported unasked."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys

import pytest

from gem import cli
from gem.errors import TRAIN_PACKAGES
from tests.faults.calls import call
from tests.import_rules import ROOT, files

# Libraries that a run may do without: imported where they are used, never with the file.
UNASKED = {
    *("peft", "bitsandbytes", "deepspeed", "sklearn", "scipy", "pandas", "datasets", "pyarrow", "wandb", "trackio"),
    *("tensorboard", "vllm", "liger_kernel", "trl", "gguf"),
}
# transformers.trainer_utils, where set_seed is, imports peft, and that bitsandbytes.
DEAR = {("transformers", "set_seed"), ("transformers", "Trainer")}

MISTAKES = r"""
import contextlib, io, json, sys
from pathlib import Path
from gem import cli

folder = Path(sys.argv[1])
(folder / "typo.yaml").write_text("sede: 1\n")
(folder / "good.yaml").write_text("model: ./none\ntrain_file: none.jsonl\noutput_dir: out\n")
(folder / "pairs.jsonl").write_text("{}\n")
(folder / "full").mkdir()
(folder / "full" / "x").write_text("")
calls = [
    ["--help"],
    ["train", "typo.yaml"],
    ["train", "none.yaml"],
    ["train", "good.yaml"],
    ["train", "good.yaml", "--train_file", "pairs.jsonl"],
    ["train", "good.yaml", "--max_steps", "-1"],
    ["train", "--model", "org/m", "--train_file", "org/t", "--output_dir", "full"],
    ["train", "--model", "org/m", "--train_file", "org/t", "--output_dir", "out", "--score", "none.json"],
    ["demo", "--output-dir", "full"],
    ["score", "org/model", "pairs.jsonl", "--score", "none.json"],
    ["generate", "org/model", "2 + 2?", "--score", "none.json"],
    ["score", "./none", "pairs.jsonl"],
    ["score", "org/model", "none.jsonl"],
    ["score", "org/model", "pairs.jsonl", "--top-m", "2"],
    ["generate", "./none", "2 + 2?"],
    ["evaluate", "./none", "pairs.jsonl"],
    ["calibrate", "./none", "pairs.jsonl"],
]
found = []
for arguments in calls:
    sys.argv = ["gem", *arguments]
    errors = io.StringIO()
    code = 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code or 0
    found.append([code, errors.getvalue(), sorted({"torch", "transformers", "numpy"} & set(sys.modules))])
print(json.dumps(found))
"""
LINES = [
    (0, ""),
    (2, "unknown key 'sede'; did you mean 'seed'?"),
    (2, "none.yaml: cannot read the config: No such file or directory"),
    (2, "none.jsonl: cannot read it: no such file or directory"),
    (2, "model: ./none: no such file or directory"),
    (2, "max_steps: expected at least 0, got -1"),
    (2, "output_dir: full is not empty; give the name of a new directory"),
    (2, "paper or calibrated or a score.json of gem calibrate; none.json: cannot read it: no such file"),
    (2, "output_dir: full is not empty; give the name of a new directory"),
    (2, "score: expected a score.json of gem calibrate; none.json: cannot read it: no such file"),
    (2, "score: expected a score.json of gem calibrate; none.json: cannot read it: no such file"),
    (2, "model: ./none: no such file or directory"),
    (2, "none.jsonl: cannot read it: no such file or directory"),
    (2, "--top-m: expected a share in (0, 1], got 2.0"),
    (2, "model: ./none: no such file or directory"),
    (2, "model: ./none: no such file or directory"),
    (2, "model: ./none: no such file or directory"),
]


def test_mistakes_are_told_before_torch_is_imported(tmp_path):
    """One process, which imports nothing but what the command line needs."""
    command = [sys.executable, "-c", MISTAKES, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    found = json.loads(out)
    assert len(found) == len(LINES)
    for (code, errors, imported), (expected, line) in zip(found, LINES):
        assert code == expected and line in errors and errors.count("\n") == (1 if line else 0), errors
        assert imported == [], line


NOT_INSTALLED = r"""
import runpy, sys

def without(name, act):
    sys.modules[name] = None
    try:
        act()
    except ImportError as error:
        print("ImportError:", error)
    except SystemExit as exit:
        print("exit", exit.code, file=sys.stderr)
    del sys.modules[name]

def command():
    runpy.run_module("gem", run_name="__main__")

def python():
    import gem
    gem.train

sys.argv = ["gem", "--help"]
without("rich", python)
without("transformers", python)
without("typer", command)
without("pydantic", command)
"""
LACKS = "the training loop needs more packages: pip install 'gem-kernels[train]'"


def test_the_loop_without_its_packages_says_how_to_have_them(tmp_path):
    """As after `pip install gem-kernels` alone: nothing but a line, from the command and from Python."""
    done = subprocess.run([sys.executable, "-c", NOT_INSTALLED], capture_output=True, text=True, cwd=ROOT)
    lines = [f"gem: {LACKS} ({name} is missing)\nexit 2\n" for name in ("typer", "pydantic")]
    assert (done.returncode, done.stderr) == (0, "".join(lines))
    errors = [f"ImportError: gem.train: {LACKS} ({name} is missing)\n" for name in ("rich", "transformers")]
    assert done.stdout == "".join(errors)


def test_what_a_command_lacks_is_no_bug(monkeypatch):
    def broken(name):
        def raises(*_):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return raises

    monkeypatch.setattr(cli, "commented_config", broken("transformers.models"))
    assert call("config") == (2, "", f"gem: {LACKS} (transformers is missing)\n")
    monkeypatch.setattr(cli, "commented_config", broken("gem.nothing"))
    assert call("config")[0] == 1


def test_every_package_of_the_extra_is_known():
    names = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
    extra = re.search(r"^train = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)[1]
    packages = re.findall(r'"([\w-]+)', extra)
    assert len(packages) > 10 and {names.get(name, name) for name in packages} <= TRAIN_PACKAGES
    assert (ROOT / "gem" / "__main__.py").is_file() and 'gem = "gem.__main__:main"' in (
        ROOT / "pyproject.toml"
    ).read_text()


# What the trainer of an adapter is, where its file has another name, or brings along.
ADAPTERS = {"integrations.trl_sega": {"trl", "transformers"}, "integrations.axolotl": {"axolotl", "trl"}}


def imports_of_a_file(source: str) -> set[tuple[str, str | None]]:
    """(package, name) of what importing the file imports: what stands in no function."""
    found: set[tuple[str, str | None]] = set()
    left = list(ast.parse(source).body)
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            found |= {(alias.name.partition(".")[0], None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {((node.module or "").partition(".")[0], alias.name) for alias in node.names}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            left += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("package", ["gem", "gem_kernels"])
def test_no_file_imports_what_a_run_may_do_without(package):
    for name, path in files(package).items():
        found = imports_of_a_file(path.read_text())
        own = ADAPTERS.get(name, {name.removeprefix("integrations.")})  # who imports an adapter has its trainer
        assert not ({library for library, _ in found} & UNASKED) - own, name
        assert not found & DEAR, name


def test_the_rule_sees_an_import():
    source = "try:\n    import peft.tuners\nexcept ImportError:\n    pass\nfrom transformers import set_seed\n"
    assert imports_of_a_file(source) == {("peft", None), ("transformers", "set_seed")}
    assert imports_of_a_file("def f():\n    import peft\n") == set()
    assert (ROOT / "gem").is_dir()
