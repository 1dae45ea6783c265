"""README and docs: links resolve, names exist, the example runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

import gem_kernels

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
}
FENCE = re.compile(r"^```.*?^```", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
SETTING = re.compile(r"`([a-z][a-z0-9_]*): [^`\n]+`")
FILE = re.compile(r"(?<![\w/.])((?:gem|gem_kernels|tests|bench|docs|\.ci|\.github)/[\w./-]*\w\.\w+)")


def anchors(text: str) -> set[str]:
    """The anchors GitHub makes of a page's headings."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", FENCE.sub("", text), flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return set(found)


def broken(page: str, text: str) -> list[str]:
    """The relative links of a page that lead nowhere."""
    wrong = []
    for link in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            wrong.append(link)
    return wrong


def settings(monkeypatch, capsys) -> set[str]:
    """Every setting of a run, as `gem config` prints them."""
    from gem import cli

    monkeypatch.setattr(sys, "argv", ["gem", "config"])
    try:
        cli.main()
    except SystemExit as exit:
        assert not exit.code
    return set(yaml.safe_load(capsys.readouterr().out))


def test_the_rules_see_what_they_should():
    text = "# A `b_c` of [D](x.md)!\n## Twice\n## Twice\n```\n# no heading\n[no](link.md)\n```\n"
    text += "[x](nowhere.md) [y](#twice-1)"
    assert anchors(text) == {"a-b_c-of-d", "twice", "twice-1"}
    assert broken("README.md", text.replace("x.md", "README.md").replace("#twice-1", "#n")) == ["nowhere.md", "#n"]
    assert SETTING.findall("`loss_type: token`, `text`, `std::x`") == ["loss_type"]
    found = FILE.findall("`gem/a/b.py` and tests/c.py. Not https://x.org/gem/b.py, agem/b.py, gem/score.")
    assert found == ["gem/a/b.py", "tests/c.py"]


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    assert broken(page, PAGES[page]) == []


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 120


def test_settings_exist(monkeypatch, capsys):
    known = settings(monkeypatch, capsys)
    named = {page: set(SETTING.findall(text)) - known for page, text in PAGES.items()}
    for page, text in PAGES.items():
        for block in re.findall(r"^```yaml\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
            named[page] |= set(yaml.safe_load(block)) - known
    assert not {page: names for page, names in named.items() if names}
    assert "loss_type" in known and any("use_peft" in SETTING.findall(text) for text in PAGES.values())


FOLDERS = ("gem/config", "gem_kernels/backends", "tests/gem", "tests/kernels")


@pytest.mark.skipif(
    not all((ROOT / folder).is_dir() for folder in FOLDERS),
    reason="the pages name the files of the folders; drop this mark once they are there",
)
def test_files_exist():
    named = {(page, file) for page, text in PAGES.items() for file in FILE.findall(text)}
    named |= {(page, file) for page, text in PAGES.items() for file in re.findall(r"`(\w+/\w+\.\w+)`", text)}
    places = (ROOT, ROOT / "gem_kernels", ROOT / "docs")
    wrong = [(page, file) for page, file in named if not any((place / file).exists() for place in places)]
    assert not wrong


def test_public_functions_are_described():
    text = "\n".join(text for page, text in PAGES.items() if page == "README.md" or page.startswith("docs/"))
    functions = [name for name in gem_kernels.__all__ if not isinstance(getattr(gem_kernels, name), type)]
    assert "token_stats" in functions
    assert [name for name in functions if f"`{name}`" not in text] == []


def test_the_example_of_the_readme():
    code = re.search(r"^```python\n(.*?)^```", PAGES["README.md"], flags=re.MULTILINE | re.DOTALL)[1]
    torch.manual_seed(0)
    hidden, weight = torch.randn(32, 7, 16, requires_grad=True), torch.randn(53, 16, requires_grad=True)
    targets, mask = torch.randint(53, (32, 7)), torch.ones(32, 7, dtype=torch.bool)
    batch = {"completion_mask": mask, "answer_start": torch.full((32,), 4), "group_size": 8}
    full = gem_kernels.sega_loss(hidden @ weight.T, targets, **batch)
    expected = torch.autograd.grad(full.loss, (hidden, weight))
    names = {"hidden": hidden, "weight": weight, "targets": targets, "mask": mask, **batch}
    exec(code, names)
    torch.testing.assert_close(names["out"].loss, full.loss)
    for tensor, gradient in zip((hidden, weight), expected):
        error = (tensor.grad - gradient).abs().max() / gradient.abs().max()
        assert float(error) < 1e-5
    torch.testing.assert_close(names["stats"].entropy, full.entropy)


def test_the_words_of_the_benchmarks_are_the_generator_s():
    from bench.report import INTRO

    assert PAGES["docs/benchmarks.md"].startswith(INTRO)
