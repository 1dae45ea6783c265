"""What the kernels compile to, counted with no GPU, in processes without the interpreter; and when they recompile."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gem_kernels.types import EXTRA_STATS

ROOT = Path(__file__).parents[2]
TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942"}
KERNELS = ROOT / "gem_kernels" / "backends" / "triton"


def python(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


@pytest.fixture(scope="module")
def lines(made_once) -> list[str]:
    """What one process prints, which imports torch and Triton once: three lines, those of bench.sass, and KEYS'."""

    def make(folder):
        code = CATALOGUE + RUNTIME_ARGUMENTS + TRITON_ON_CPU + ROWS + KEYS
        (folder / "lines").write_text(python("-c", code))

    return (made_once("machine_code", make) / "lines").read_text().splitlines()


# `--all` counts the inner loops too.
ROWS = """
from bench import sass
sass.main(["--all", "--json"])
"""


@pytest.fixture(scope="module")
def rows(lines) -> list[dict]:
    return [json.loads(line) for line in lines[3:-1]]


@pytest.fixture(scope="module")
def counted(rows) -> dict[str, dict]:
    return {row["kernel"]: row for row in rows if "instructions_per_element" in row}


MOST = {
    "forward_bf16_occupancy_4": 10, "forward_bf16_split_occupancy_4": 10,
    "forward_bf16": 10, "forward_bf16_split": 10, "backward_bf16": 8.5,
    "forward_bf16_softcap": 18, "backward_bf16_softcap": 19.5,
}  # fmt: skip


@pytest.mark.parametrize("kernel,most", MOST.items())
def test_instructions_of_the_inner_loop(kernel, most, counted):
    """At 4.3 TB/s an H200 can spend 15.5 on each bf16 element; plain code (a mask in every block) takes 24."""
    row = counted[kernel]
    assert row["target"] == "sm_90"
    assert 4 < row["instructions_per_element"] <= most, "fewer than 4 means that another loop was counted"
    assert row["all_16_bytes"] and row["global_accesses"] >= (8 if "backward" in kernel else 4)
    assert row["local_bytes"] == 0


def test_each_statistic_that_is_asked_for_has_its_price(counted):
    """In instructions an element more than none; and none of them keeps a row's loop from 16-byte loads."""
    price = {
        name: counted[f"forward_bf16_{name}"]["instructions_per_element"]
        - counted["forward_bf16"]["instructions_per_element"]
        for name in EXTRA_STATS
    }
    assert abs(price.pop("top_logprob")) < 0.3
    assert price.pop("varentropy") < 7 and max(price.values()) < 2.5, price
    for name in (*(f"forward_bf16_{name}" for name in EXTRA_STATS), "forward_bf16_extra", "forward_bf16_softcap_extra"):
        assert counted[name]["all_16_bytes"] and counted[name]["local_bytes"] == 0, name


def test_four_programs_share_a_multiprocessor(counted):
    """Of 65,536 registers each of the 256 threads has 64: an option (`launch.OCCUPANCY`). By default two do."""
    for dtype in ("bf16", "fp16", "fp32"):
        row = counted[f"forward_{dtype}_occupancy_4"]
        assert row["registers"] <= 64 and row["local_bytes"] == 0 and row["warps"] == 8
    assert 65_536 // (counted["forward_bf16"]["registers"] * 256) == 2


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_row_of_logits_is_read_16_bytes_at_a_time(dtype, counted):
    passes = [f"{name}_{dtype}{cap}" for cap in ("", "_softcap") for name in ("forward", "backward")]
    for kernel in (*passes, f"forward_{dtype}_split"):
        assert counted[kernel]["all_16_bytes"], kernel
    assert not counted["backward_bf16_apart"]["all_16_bytes"], "the test sees what is not aligned"


def test_every_kernel_compiles_everywhere_without_spills(rows):
    compiled = {}
    for row in rows:
        if row.get("compiled"):
            compiled.setdefault(row["kernel"], {})[row["target"]] = row
    assert len(compiled) >= 29
    for kernel, by_target in compiled.items():
        assert set(by_target) == TARGETS, kernel
        for target, row in by_target.items():
            if target != "gfx942":
                assert row["local_bytes"] == 0, f"{kernel} uses {row['local_bytes']} bytes of local memory on {target}"
                assert 0 < row["registers"] <= 255


def test_on_amd_no_gradient_needs_a_barrier_to_wait_for_stores(rows):
    """gfx942's barrier does not; NVIDIA's does, and there the target's term is stored behind one."""
    barriers = {row["kernel"]: row["barriers"] for row in rows if row.get("target") == "gfx942"}
    backward = [name for name in barriers if name.startswith("backward") and not name.endswith("apart")]
    assert len(backward) >= 6 and all(barriers[name] == 0 for name in backward)
    assert barriers["span_scores_padded"] > 0, "the count sees barriers"


def jit_functions(path: Path) -> set[str]:
    decorated = (n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and n.decorator_list)
    return {n.name for n in decorated if "triton.jit" in ast.unparse(n.decorator_list[0])}


def launched() -> set[str]:
    """Kernels that the package starts: `kernel[grid](...)` in any file."""
    names = set()
    for path in (ROOT / "gem_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                function = node.func.value
                names.add(function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", ""))
    kernels = set().union(*(jit_functions(p) for p in KERNELS.glob("*.py")))
    return names & kernels


CATALOGUE = """
import json
from gem_kernels.backends.triton.catalogue import kernels
print(json.dumps(sorted({s.kernel.fn.__name__ for s in kernels()})))
"""


def test_the_catalogue_covers_every_kernel_that_is_launched(lines):
    assert len(launched()) >= 5
    assert launched() == set(json.loads(lines[0]))
    sources = "".join(path.read_text() for path in KERNELS.glob("*.py"))
    for path in KERNELS.glob("*.py"):
        for name in jit_functions(path) - launched():
            assert sources.count(f"{name}(") > 1, f"{path.name}: nothing reaches {name}"


RUNTIME_ARGUMENTS = """
import json
from gem_kernels.backends.triton import row_gradient, row_stats, span_scores
found = {
    name: [[p.name, p.is_constexpr, p.do_not_specialize] for p in kernel.params]
    for module in (row_stats, row_gradient, span_scores)
    for name, kernel in vars(module).items()
    if hasattr(kernel, "params") and not name.startswith("_")
}
print(json.dumps(found))
"""
SIZES = {"V", "N", "T", "G", "n_inner", "span", "n_splits", "ignore_index", "top_numerator"} | {
    "top_denominator", "extra_stride"
}  # fmt: skip


def test_sizes_are_run_time_arguments(lines):
    """Integers are specialized by Triton (1, multiples of 16) unless told otherwise; each would compile again."""
    kernels = json.loads(lines[1])
    assert {"row_stats_forward", "row_stats_combine", "row_stats_backward", "span_scores", "group_advantages"} <= set(
        kernels
    )
    seen = set()
    for kernel, parameters in kernels.items():
        for name, constexpr, unspecialized in parameters:
            if name in SIZES or name.startswith(("stride_", "grad_outer", "grad_inner")):
                assert not constexpr and unspecialized, f"{kernel}: {name}"
                seen.add(name)
            if name in ("temperature", "temperature_ptr", "softcap", "fork_weight", "eps"):
                assert not constexpr, f"{kernel}: {name}"
    assert seen >= SIZES


TRITON_ON_CPU = """
import torch, gem_kernels
found = []
for call in (
    lambda: gem_kernels.token_stats(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), backend="triton"),
    lambda: gem_kernels.group_advantages(torch.zeros(2), 2, backend="triton"),
):
    try:
        call()
    except ValueError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def test_triton_on_the_cpu_without_the_interpreter_is_refused(lines):
    found = json.loads(lines[2])
    assert len(found) == 2
    assert all(re.match("`backend` must be 'auto' or 'torch'.*, got 'triton'", message) for message in found)


# Triton's own binder gives the key it compiles under; nothing is compiled or launched. CPU tensors stand for a GPU's.
KEYS = """
import json, sys
import torch
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime import jit
import gem_kernels
from gem_kernels import arguments

backend = backends["nvidia"].compiler(GPUTarget("cuda", 90, 32))
keys = {}

def run(self, *args, grid, warmup, **kwargs):
    if not hasattr(self, "test_binder"):
        self.test_binder = jit.create_function_from_signature(self.signature, self.params, backend)
    kwargs["debug"] = False
    _, specialization, options = self.test_binder(*args, **kwargs)
    keys.setdefault(self.fn.__name__, set()).add(str(specialization) + str(options))

jit.JITFunction.run = run
arguments._interpreting = lambda: True

def step(B, T, V, temperature, ignore_index=-100, top_m=0.1, fork_weight=1.0, group_size=2, view=lambda x: x):
    torch.manual_seed(0)
    logits = view(torch.zeros(B, T, V, dtype=torch.bfloat16)).requires_grad_()
    T = logits.shape[1]
    mask = torch.ones(B, T, dtype=torch.bool)
    out = gem_kernels.sega_loss(logits, torch.zeros(B, T, dtype=torch.int64), completion_mask=mask,
        answer_start=torch.zeros(B, dtype=torch.int64), group_size=group_size, temperature=temperature, top_m=top_m,
        fork_weight=fork_weight, ignore_index=ignore_index, backend="triton")
    out.loss.backward()

step(2, 8, 10_000, 1.0)
before = {k: set(v) for k, v in keys.items()}
step(4, 8, 10_000, 1.0)
step(2, 1, 10_000, 1.0)
step(2, 16, 10_000, 1.0)
step(6, 17, 10_000, 0.7)
step(2, 8, 10_001, 1)
step(2, 8, 16_384, 2.5, ignore_index=0, top_m=16, fork_weight=0.0)
step(2, 9, 10_000, 1.0, view=lambda x: x[:, :-1])
step(2, 9, 10_001, 1.0, view=lambda x: x[:, 1:])
step(2, 9, 10_001, 1.0, view=lambda x: x[:, :-1, 3:])
changed = {k: len(v) for k, v in keys.items() if len(v) != len(before[k])}
for B, T in ((2, 8), (4, 8), (3, 7)):
    logits = torch.zeros(B, T, 10_000, dtype=torch.bfloat16)
    gem_kernels.token_stats(logits, torch.zeros(B, T, dtype=torch.int64), backend="triton", extra=("margin", "is_top1"))
step(2, 8, 10_000, torch.ones(2, 8))
print(json.dumps([sorted(before), changed, {k: len(v) - len(before[k]) for k, v in keys.items()}]))
"""


def test_nothing_recompiles_when_sizes_or_temperature_change(lines):
    kernels, changed, more = json.loads(lines[-1])
    assert kernels == ["group_advantages", "row_stats_backward", "row_stats_forward", "span_scores"]
    assert not changed, "compiled again for another N, T, B, V, stride, temperature, ignore_index, top_m or fork_weight"
    assert more["row_stats_forward"] == 2, "a tensor of temperatures is another kernel, so are statistics; nothing else"
