"""The notebooks of docs/: without outputs; their code runs from its first cell to its last, on a tiny model."""

from __future__ import annotations

import ast
import contextlib
import io
import json
from pathlib import Path

import pytest

from tests.helpers import save_tiny

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOKS = {name: json.loads((DOCS / f"{name}.ipynb").read_text(encoding="utf-8")) for name in ("python", "entropy")}


def code(name):
    return ["".join(cell["source"]) for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == "code"]


def run(name, replaced):
    """With other constants in place of those that the notebook gives these names -> its names, what it printed."""
    replaced, names, printed = dict(replaced), {}, io.StringIO()
    for number, source in enumerate(code(name)):
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
    return names, printed.getvalue()


def test_each_is_a_notebook_as_it_is_written():
    assert sorted(path.stem for path in DOCS.glob("*.ipynb")) == sorted(NOTEBOOKS)
    for name, notebook in NOTEBOOKS.items():
        assert notebook["nbformat"] == 4 and len(code(name)) >= 5
        ids = [cell["id"] for cell in notebook["cells"]]
        assert len(set(ids)) == len(ids)
        for cell in notebook["cells"]:
            assert cell["source"] and not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.filterwarnings("ignore::UserWarning")  # of rows and scores: a page of Python shows them
def test_gem_from_python(tmp_path):
    """With a model made in a moment and answers of six tokens; nothing else differs."""
    model = save_tiny(tmp_path / "model", context=1024)
    names, printed = run("python", {"MODEL": str(model), "RUN": str(tmp_path / "run"), "LENGTH": 6})
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert "learning_rate: expected at least 0, got -1" in printed
    assert len(names["rows"]) == 2 and 0 <= names["before"].preference.accuracy <= 1


def test_the_entropy_score(tmp_path):
    """The tiny model never writes the marker: the last fifth of twelve tokens is underlined, from the tenth on."""
    names, printed = run("entropy", {"MODEL": str(save_tiny(tmp_path / "model", context=1024)), "LENGTH": 12})
    page, out, mask = names["page"]._repr_html_(), names["out"], names["mask"]
    assert page.count("<span") == int(mask.sum()) and page.count("<p>") == 4 == printed.count("advantage")
    lengths = mask.sum(1)
    assert page.count("underline") == int((lengths - 4 * lengths // 5).sum())
    assert (
        f"entropy {float(out.entropy[0, 0].detach()):.2f}, log-prob" in page and abs(float(out.advantages.sum())) < 1e-5
    )
    assert names["model"].get_input_embeddings().weight.grad.any()
