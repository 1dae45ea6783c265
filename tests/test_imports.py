"""In gem_kernels a file imports only from files above it, and importing does nothing. (gem: test_gem_imports.py.)"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import gem_kernels

ROOT = Path(__file__).parents[1]
PACKAGE = "gem_kernels"

# From the top down. A file may import what stands above it. A planned file may be listed before it exists.
ORDER = [
    "types",
    "reference",
    "backends.triton.row_stats",
    "backends.triton.span_scores",
    "backends.triton.catalogue",
    "backends.triton.launch",
    "backends.cpu.build",
    "backends.cpu.row_stats",
    "backends.cpu.span_scores",
    "arguments",
    "backends.rows",
    "logit_stats",
    "scores",
    "losses",
    "linear.active_vocab",
    "linear.vocab_parallel",
    "linear.head",
    "linear.products",
    "linear.stats",
    "linear.one_shot",
    "linear.policy_loss",
    "linear.sega_loss",
    "integrations.transformers",
]
# A promise to other trainers.
PROMISED = """
    token_stats linear_token_stats entropy_scores group_advantages fused_entropy_score fused_linear_entropy_score
    sega_loss fused_linear_sega_loss fused_linear_policy_loss
    TokenStats EntropyScores EntropyScoreOutput SegaOutput
"""


def files(package: str) -> dict[str, Path]:
    """Dotted name within the package -> file, __init__ files that hold no code left out."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT / package).with_suffix("").parts
        if parts[-1] == "__init__":
            body = ast.parse(path.read_text()).body
            if parts == ("__init__",) or all(isinstance(n, ast.Expr) for n in body):
                continue
        found[".".join(parts)] = path
    return found


def imports(path: Path, package: str, source: str | None = None) -> list[tuple[str, str | None]]:
    """Every import of the file, inside functions too: (absolute module, imported name or None)."""
    here = [package, *path.relative_to(ROOT / package).with_suffix("").parts]
    found = []
    for node in ast.walk(ast.parse(path.read_text() if source is None else source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(module, alias.name) for alias in node.names]
    return found


def inner_targets(path: Path, package: str, names: set[str], source: str | None = None) -> set[str]:
    """The files of the same package that this one imports."""
    targets = set()
    for module, name in imports(path, package, source):
        if module != package and not module.startswith(package + "."):
            continue
        inside = module[len(package) + 1 :]
        candidates = (f"{inside}.{name}" if inside else name, inside) if name else (inside,)
        targets.add(next((c for c in candidates if c in names), f"{module}:{name}"))
    return targets


def test_every_file_has_its_place():
    unplaced = set(files(PACKAGE)) - set(ORDER)
    assert not unplaced, f"add {sorted(unplaced)} to ORDER in tests/test_imports.py, below all that they import"
    assert len(set(ORDER)) == len(ORDER)


def test_a_file_imports_only_from_files_above_it():
    present = files(PACKAGE)
    for name, path in present.items():
        for target in inner_targets(path, PACKAGE, set(present)):
            assert target in ORDER, f"{name} imports {target}: name the file, not the package"
            assert ORDER.index(target) < ORDER.index(name), f"{name} imports {target}, which is not above it"


def test_the_rule_sees_every_spelling():
    names = {"types", "scores", "backends.triton.row_stats", "logit_stats"}
    path = ROOT / "gem_kernels" / "scores.py"
    for line, target in {
        "from .types import X": "types",
        "from . import types": "types",
        "def f():\n    from .backends.triton import row_stats": "backends.triton.row_stats",
        "import gem_kernels.logit_stats": "logit_stats",
        "from gem_kernels.backends.triton.row_stats import f": "backends.triton.row_stats",
        "from gem_kernels import logit_stats": "logit_stats",
        "import torch": None,
    }.items():
        assert inner_targets(path, "gem_kernels", names, line) == ({target} if target else set())


def test_gem_kernels_knows_nothing_of_gem_and_little_else():
    """torch and triton; an integration its own trainer, and peft beside it."""
    for name, path in files("gem_kernels").items():
        allowed = {"torch", "triton", "gem_kernels", *sys.stdlib_module_names}
        if name.startswith("integrations."):
            allowed |= {name.removeprefix("integrations."), "peft"}
        for module, _ in imports(path, "gem_kernels"):
            assert module.split(".")[0] in allowed, f"gem_kernels/{name} imports {module}"


def test_public_names():
    assert set(PROMISED.split()) <= set(gem_kernels.__all__)
    assert list(gem_kernels.__all__) == sorted(gem_kernels.__all__)
    for name in gem_kernels.__all__:
        assert callable(getattr(gem_kernels, name)) and getattr(gem_kernels, name).__doc__


IMPORT_ALONE = """
import sys

TORCH_NEEDS = {"torch", "torchgen", "functorch", "numpy", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2",
               "markupsafe", "filelock", "fsspec", "setuptools", "pkg_resources", "_distutils_hack", "optree"}

class OnlyTorch:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        known = TORCH_NEEDS | {"gem_kernels"} | sys.stdlib_module_names
        if top in known or top.startswith(("__editable__", "_sysconfig")):
            return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [OnlyTorch(finder) for finder in sys.meta_path]
import torch
before = torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
environment = dict(__import__("os").environ)
import gem_kernels
assert not {"triton", "transformers", "gem"} & {name.partition(".")[0] for name in sys.modules}
assert not torch.cuda.is_initialized()
assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
assert environment == dict(__import__("os").environ)
logits = torch.randn(2, 3, 11).requires_grad_()
out = gem_kernels.sega_loss(logits, torch.zeros(2, 3, dtype=torch.int64), group_size=2,
    completion_mask=torch.ones(2, 3, dtype=torch.bool), answer_start=torch.tensor([1, 2]))
out.loss.backward()
assert logits.grad.abs().sum() > 0
assert "triton" not in sys.modules
try:
    import transformers
except ModuleNotFoundError:
    print("alone")
"""


def test_import_with_torch_alone():
    """A fresh process in which every other module is missing: it imports, does nothing, and works on a CPU."""
    run = subprocess.run([sys.executable, "-c", IMPORT_ALONE], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == "alone", run.stderr


def test_import_leaves_the_compiler_alone():
    """Where everything is installed too: neither Triton nor torch._dynamo, which cost seconds."""
    code = "import sys, gem_kernels; print(*{'triton', 'torch._dynamo', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == ""
