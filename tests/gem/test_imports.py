"""The floor plan of gem: a folder imports only from those below it, and no folder grows out of sight."""

from __future__ import annotations

import ast
from functools import cache

import gem_kernels
from tests import import_rules
from tests.import_rules import ROOT, broken_rules, files, imports, inner_targets

INTEGRATION = "gem_kernels.integrations.transformers"

# From the bottom up, in the order the data moves: a room imports only from those before it.
ROOMS = [
    *("errors", "terminal", "interrupt", "files", "config", "parallel", "progress", "data", "statistics", "model"),
    *(
        "rollout",
        "scoring",
        "update",
        "evaluation",
        "calibration",
        "report",
        "use",
        "checkpoint",
        "run",
        "plan",
        "loop",
    ),
    *("demo", "api", "cli", "__main__"),
]
MOST_FLOORS = 12
MOST_FILES = 8


def arrows() -> dict[str, set[str]]:
    return import_rules.arrows("gem")


def room(name: str) -> str:
    return name.partition(".")[0]


def test_every_room_is_in_the_plan():
    rooms = {room(name) for name in files("gem")}
    assert rooms == set(ROOMS), "name it in ROOMS of tests/gem/test_imports.py, above all that it imports"
    assert len(set(ROOMS)) == len(ROOMS)


def test_a_room_imports_only_from_those_below_it():
    assert broken_rules(arrows(), ROOMS) == []


def test_imports_are_absolute():
    for name, path in files("gem").items():
        found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not any(node.level for node in found), f"write absolute imports in {name}"


def test_no_cycle_and_few_floors():
    found = arrows()
    between: dict[str, set[str]] = {name: set() for name in ROOMS}
    for name, targets in found.items():
        between[room(name)] |= {room(target) for target in targets} - {room(name)}

    def height(graph: dict[str, set[str]], name: str, below: tuple[str, ...] = ()) -> int:
        assert name not in below, f"a cycle of imports: {' -> '.join([*below, name])}"
        return 1 + max((height(graph, target, (*below, name)) for target in graph[name]), default=0)

    for name in found:  # of files, within a folder too
        inner = {k: {t for t in v if room(t) == room(name)} for k, v in found.items() if room(k) == room(name)}
        height(inner, name)
    assert max(height(between, name) for name in ROOMS) <= MOST_FLOORS


def test_no_folder_is_crowded_and_each_says_what_is_in_it():
    folders = [ROOT / "gem", *(path for path in (ROOT / "gem").rglob("*") if (path / "__init__.py").is_file())]
    assert len(folders) > 8
    for folder in folders:
        inside = [path for path in folder.glob("*.py") if path.name not in ("__init__.py", "__main__.py")]
        assert len(inside) <= MOST_FILES, folder
        body = ast.parse((folder / "__init__.py").read_text()).body
        assert folder.name == "gem" or (len(body) == 1 and ast.get_docstring(ast.Module(body, []))), folder


@cache
def kernel_imports() -> dict[str, list[tuple[str, str | None]]]:
    found = {name: imports(path, "gem") for name, path in files("gem").items()}
    return {
        name: kernels
        for name, lines in found.items()
        if (kernels := [(module, what) for module, what in lines if module.split(".")[0] == "gem_kernels"])
    }


def test_gem_sees_only_public_names_of_gem_kernels():
    for name, lines in kernel_imports().items():
        for module, imported in lines:
            assert module in ("gem_kernels", INTEGRATION), f"{name} imports {module}"
            assert module == INTEGRATION or imported in gem_kernels.__all__, f"{name} imports {imported}"
    assert "model.forward" in kernel_imports()  # the rule looks at something


def test_the_rule_sees_every_spelling():
    names, path = {"errors", "data.pairs", "data.batches"}, ROOT / "gem" / "train.py"
    for line, target in {
        "from gem.data.pairs import load_pairs": "data.pairs",
        "from gem.data import pairs as p": "data.pairs",
        "import gem.data.pairs": "data.pairs",
        "def f():\n    from gem import errors": "errors",
        "from gem.data import load_pairs": "gem.data:load_pairs",
        "import torch": None,
    }.items():
        assert inner_targets(path, "gem", names, line) == ({target} if target else set())
