"""What a package's files import of each other, read from their source; for the tests of the import rules."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


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


def arrows(package: str) -> dict[str, set[str]]:
    """Every file of the package -> the files of it that it imports."""
    present = files(package)
    return {name: inner_targets(path, package, set(present)) for name, path in present.items()}


def stage_of(name: str, stages: list[str]) -> int:
    """The stage of a file: the longest entry that is its name or a folder above it."""
    places = [
        (len(part), i)
        for i, stage in enumerate(stages)
        for part in stage.split()
        if name == part or name.startswith(part + ".")
    ]
    assert places, f"{name} has no place: add it, or its folder, to STAGES, below all that it imports"
    return max(places)[1]


def broken_rules(arrows: dict[str, set[str]], stages: list[str]) -> list[str]:
    """arrows: file -> the files it imports. A stage imports only from itself and from stages above it; no cycle."""
    found = []
    for name, targets in arrows.items():
        for target in targets:
            if target not in arrows:
                found.append(f"{name} imports {target}: name the file, not the package")
            elif stage_of(target, stages) > stage_of(name, stages):
                found.append(f"{name} imports {target}, whose stage is below its own")
    left = {name: {t for t in targets if t in arrows} for name, targets in arrows.items()}
    while free := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in free}
    return found + ([f"a cycle among {sorted(left)}"] if left else [])


FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal"),
    *("ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}


def vague_allocations(source: str) -> list[str]:
    """Calls of torch's factories that leave dtype or device to the caller's defaults."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        if of_torch and node.func.attr in FACTORIES and not {"dtype", "device"} <= {k.arg for k in node.keywords}:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found
