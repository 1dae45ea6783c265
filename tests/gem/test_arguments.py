"""Arguments that belong together travel together: no function of gem takes more than ten."""

import ast
from pathlib import Path

GEM = Path(__file__).parents[2] / "gem"
MOST = 10


def too_many(source: str) -> list[str]:
    """Functions of more than ten parameters, `self` and `cls` not counted; commands of the command line may have more:
    each of theirs is a flag."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if any("command(" in ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ())):
            continue
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        number = len(names) - (names[:1] in (["self"], ["cls"]))
        if number > MOST:
            found.append(f"{getattr(node, 'name', 'lambda')}: {number} parameters")
    return found


def test_no_function_has_more_than_ten_parameters():
    for path in sorted(GEM.rglob("*.py")):
        assert not too_many(path.read_text()), path


def test_the_rule_sees_what_it_should():
    eleven = ", ".join(f"a{i}" for i in range(11))
    assert too_many(f"def f({eleven}): pass") == ["f: 11 parameters"]
    assert too_many(f"class A:\n    def f(self, {eleven[:-5]}): pass") == []
    assert too_many(f"def f(a, *, {eleven[4:]}): pass") == ["f: 11 parameters"]
    assert too_many(f"@app.command('x')\ndef f({eleven}): pass") == []
