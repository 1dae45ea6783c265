"""docs/python.ipynb: a notebook without outputs, whose code runs from its first cell to its last, on a tiny model."""

from __future__ import annotations

import ast
import contextlib
import io
import json
from pathlib import Path

import pytest

from tests.helpers import save_tiny

NOTEBOOK = json.loads((Path(__file__).parents[2] / "docs" / "python.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_it_is_a_notebook_as_it_is_written():
    assert NOTEBOOK["nbformat"] == 4 and len(CODE) >= 6
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in NOTEBOOK["cells"]:
        assert cell["source"] and not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.filterwarnings("ignore::UserWarning")  # of rows and scores: a page of Python shows them
def test_every_cell_runs(tmp_path):
    """With a model made in a moment and answers of six tokens; nothing else differs."""
    replaced = {"MODEL": str(save_tiny(tmp_path / "model", context=1024)), "RUN": str(tmp_path / "run"), "LENGTH": 6}
    names: dict = {}
    printed = io.StringIO()
    for number, source in enumerate(CODE):
        tree = ast.parse(source)
        for node in tree.body:
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and node.targets[0].id in replaced
            ):
                node.value = ast.Constant(replaced.pop(node.targets[0].id))
        with contextlib.redirect_stdout(printed):
            exec(compile(ast.fix_missing_locations(tree), f"cell {number}", "exec"), names)
    assert not replaced
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert "learning_rate: expected at least 0, got -1" in printed.getvalue()
    assert len(names["rows"]) == 2 and 0 <= names["before"].preference.accuracy <= 1
