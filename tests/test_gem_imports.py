"""In gem a file imports only from files above it, and of gem_kernels only what is public."""

from __future__ import annotations

from test_imports import ROOT, files, imports, inner_targets

import gem_kernels

# From the top down, as in the README's tree.
TREE = """
    errors progress settings config
    arithmetic rows spans data
    zero distributed adapters model trainer zero_trainer checkpoint
    policy reference few_rows rollout vllm ranking filtering
    update measures evaluate guards
    calibration.features calibration.score_file calibration.fit calibration.probability calibration.samples
    calibration.table
    tracking reports session stages safeguards train
    scorefile demo cli __main__
"""
ORDER = TREE.split()
INTEGRATION = "gem_kernels.integrations.transformers"


def test_every_file_has_its_place():
    unplaced = set(files("gem")) - set(ORDER)
    assert not unplaced, f"add {sorted(unplaced)} to ORDER in tests/test_gem_imports.py, below all that they import"
    assert len(set(ORDER)) == len(ORDER)


def test_a_file_imports_only_from_files_above_it():
    present = files("gem")
    for name, path in present.items():
        for target in inner_targets(path, "gem", set(present)):
            assert target in ORDER, f"{name} imports {target}: name the file, not the package"
            assert ORDER.index(target) < ORDER.index(name), f"{name} imports {target}, which is not above it"


def test_gem_sees_only_public_names_of_gem_kernels():
    seen = set()
    for name, path in files("gem").items():
        for module, imported in imports(path, "gem"):
            if module.split(".")[0] != "gem_kernels":
                continue
            seen.add(name)
            assert module in ("gem_kernels", INTEGRATION), f"{name} imports {module}"
            assert module == INTEGRATION or imported in gem_kernels.__all__, f"{name} imports {imported}"
    assert "policy" in seen  # the rule looks at something


def test_the_readme_names_every_file():
    tree = (ROOT / "README.md").read_text().partition("## The tree")[2]
    for package in ("gem", "gem_kernels"):
        for name in files(package):
            if name != "__main__" and "." not in name:
                assert f" {name}.py" in tree, f"{package}/{name}.py"
