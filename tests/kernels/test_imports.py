"""In gem_kernels a stage imports only from stages above it, and importing does nothing."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys

import pytest

import gem_kernels
from tests.import_rules import ROOT, arrows, broken_rules, files, imports, inner_targets

PACKAGE = "gem_kernels"

# From the top down, a line a stage: files and folders that may import each other, without a cycle, and all above them.
STAGES = [
    "types arguments reference",
    "backends.types",
    "backends.triton",
    "backends.cpu",
    "backends",
    "vocab_parallel",
    "logit_stats scores losses answers score_file",
    "linear",
    "integrations",
]
# A promise to other trainers.
PROMISED = """
    token_stats linear_token_stats entropy_scores group_advantages fused_entropy_score fused_linear_entropy_score
    sega_loss fused_linear_sega_loss fused_linear_policy_loss
    TokenStats EntropyScores EntropyScoreOutput SegaOutput PolicyLossOutput VocabParallel
"""


def test_a_stage_imports_only_from_stages_above_it():
    assert broken_rules(arrows(PACKAGE), STAGES) == []


def test_every_stage_is_there():
    present = files(PACKAGE)
    for part in " ".join(STAGES).split():
        assert any(name == part or name.startswith(part + ".") for name in present), part


def test_the_rule_finds_what_breaks_it():
    stages = ["a.b", "a", "c"]
    assert broken_rules({"a.b.x": set(), "a.y": {"a.b.x"}, "c": {"a.y", "a.b.x"}}, stages) == []
    assert "below its own" in broken_rules({"a.b.x": {"a.y"}, "a.y": set()}, stages)[0]
    assert "cycle" in broken_rules({"a.y": {"a.z"}, "a.z": {"a.y"}}, stages)[0]
    assert "name the file" in broken_rules({"c": {"a"}}, stages)[0]
    with pytest.raises(AssertionError, match="no place"):
        broken_rules({"d": {"c"}, "c": set()}, stages)


def test_every_folder_says_what_is_in_it():
    for folder in {path.parent for path in files(PACKAGE).values()}:
        doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert doc and (folder.name == PACKAGE or len(doc.splitlines()) <= 3), folder


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


MOST_PARAMETERS = 10


def parameters(node: ast.FunctionDef) -> int:
    given = node.args
    several = [x for x in (given.vararg, given.kwarg) if x]
    return len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs) + len(several)


def long_signatures(source: str, public: set[str]) -> list[tuple[str, int]]:
    """Functions of more than MOST_PARAMETERS; but for public ones, operators of torch.library and Triton kernels."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name not in public:
            decorators = [ast.unparse(d) for d in node.decorator_list]
            flat = any("custom_op" in d or "triton.jit" in d or "register_fake" in d for d in decorators)
            if not flat and parameters(node) > MOST_PARAMETERS:
                found.append((node.name, parameters(node)))
    return found


def test_no_inner_function_takes_more_than_ten_arguments():
    for name, path in files(PACKAGE).items():
        assert long_signatures(path.read_text(), set(gem_kernels.__all__)) == [], name


def test_the_count_sees_every_kind_of_parameter():
    long = "def f(a, b, /, c, d, e, f, *g, h, i, j=1, k=2, **l): pass"
    assert long_signatures(long, set()) == [("f", 12)] and long_signatures(long, {"f"}) == []
    assert long_signatures("@triton.jit\n" + long, set()) == []
    assert long_signatures("class A:\n async def f(self, b, c, d, e, f, g, h, i, j, k): pass", set()) == [("f", 11)]


def test_gem_kernels_knows_nothing_of_gem_and_little_else():
    """torch and triton; an integration its own trainer (its name, or the first word), and peft and trl beside it."""
    for name, path in files("gem_kernels").items():
        allowed = {"torch", "triton", "gem_kernels", *sys.stdlib_module_names}
        if name.startswith("integrations."):
            own = name.removeprefix("integrations.")
            allowed |= {own, own.partition("_")[0], "peft"} | ({"trl"} if own == "axolotl" else set())
        for module, _ in imports(path, "gem_kernels"):
            assert module.split(".")[0] in allowed, f"gem_kernels/{name} imports {module}"


def test_types_are_shipped():
    data = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]["gem_kernels"]
    assert "py.typed" in data
    for pattern in data:
        assert list((ROOT / "gem_kernels").glob(pattern)), f"pyproject.toml: package-data names {pattern}"


def test_public_functions_name_every_type():
    for name in gem_kernels.__all__:
        if name[0].islower():
            signature = inspect.signature(getattr(gem_kernels, name))
            assert signature.return_annotation is not inspect.Signature.empty, name
            assert all(x.annotation is not inspect.Parameter.empty for x in signature.parameters.values()), name


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
    """Where everything is installed too: neither Triton nor torch._dynamo, which cost seconds, nor other libraries."""
    code = """
import sys, gem_kernels
print(*{"triton", "torch._dynamo", "transformers", "peft"} & set(sys.modules))
import gem_kernels.integrations
print(*{"triton", "transformers", "peft", "gem_kernels.integrations.transformers"} & set(sys.modules))
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out == "\n\n"
