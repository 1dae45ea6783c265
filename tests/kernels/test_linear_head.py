"""linear_token_stats and fused_linear_entropy_score against float64 autograd through the full logits.

Budget of a result: twice the error (relative, L2) of eager torch in the dtype of the inputs, plus a rounding. Memory
and the number of matrix products are held by a dispatch mode, which sees every tensor made and every product.
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

import gem_kernels
from gem_kernels import reference
from tests.kernels.helpers import (
    IGNORE,
    LINEAR_BACKENDS,
    SPAN,
    Problem,
    Recorder,
    check_stats,
    distance,
    good,
    needs_backend,
    paths,
    policy,
    problem,
    room,
    sequences,
    stats_and_gradients,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {
    "vocabulary of 1024 + 276": {"shape": (7,), "V": 1300, "D": 32},
    "hidden size 576": {"shape": (5,), "V": 300, "D": 576},
    "odd sizes, batch of sequences": {"shape": (3, 5), "V": 257, "D": 33},
    "one row": {"shape": (1,), "ignored": 0.0},
    "one word": {"shape": (6,), "V": 1, "D": 4},
    "no bias": {"shape": (9,), "bias": False},
}


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
@pytest.mark.parametrize("case", SHAPES)
def test_float32(case, backend, device):
    needs_backend(backend, device)
    shape = dict(SHAPES[case])
    check_stats(problem(*shape.pop("shape"), device=device, **shape), backend=backend, workspace_bytes=20_000)


@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=["rounded logits", "float32 logits"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit(dtype, logits_dtype, device):
    p = problem(4, 11, V=1300, D=96, dtype=dtype, device=device, softcap=10.0)
    check_stats(p, logits_dtype=logits_dtype, workspace_bytes=30_000)


def test_float32_logits_do_not_round(device):
    p = problem(40, V=1300, D=96, dtype=torch.bfloat16, device=device)
    exact, _ = p.eager(torch.float64, p.hidden.double(), p.weight.double(), p.bias.double())
    exact = reference.token_stats(exact, p.targets).logprobs
    errors = []
    for logits_dtype in (None, torch.float32):
        stats = gem_kernels.linear_token_stats(p.hidden, p.weight, p.targets, bias=p.bias, logits_dtype=logits_dtype)
        errors.append(distance(stats.logprobs, exact))
    assert errors[1] < 1e-5 < 1e-4 < errors[0]


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_softcap_scale_and_a_temperature_per_token(backend, device):
    needs_backend(backend, device)
    temperature = torch.rand(3, 5, generator=torch.Generator().manual_seed(2)) + 0.5
    p = problem(3, 5, softcap=5.0, logit_scale=0.7, temperature=temperature, device=device)
    check_stats(p, backend=backend, workspace_bytes=5000)
    p.options["temperature"] = temperature[:, :1].to(device)  # one for each sequence
    check_stats(p, backend=backend, workspace_bytes=5000)


@pytest.mark.parametrize("workspace_bytes", [1, room(257, 3), room(257, 7) + 3, 1 << 24], ids=lambda n: f"{n} bytes")
def test_chunk_sizes_agree(workspace_bytes, device):
    """1, 3 and 7 rows a chunk, and all at once."""
    p = problem(20, device=device)
    whole, parts = check_stats(p), check_stats(p, workspace_bytes=workspace_bytes)
    for name in whole:
        assert distance(parts[name], whole[name]) < 1e-6, name


def test_all_logits_far_below_zero(device):
    p = problem(9, device=device)
    p.bias -= 500.0
    check_stats(p)


@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_bias_of_minus_infinity_masks_words(backend, softcap, device):
    needs_backend(backend, device)
    p = problem(7, device=device, softcap=softcap)
    masked = [3, 100, 256]
    p.targets[torch.isin(p.targets, torch.tensor(masked, device=device))] = 5
    # The truth is that of a vocabulary without these words.
    keep = torch.tensor([v for v in range(257) if v not in masked], device=device)
    number = torch.full((257,), IGNORE, device=device).index_copy_(0, keep, torch.arange(len(keep), device=device))
    targets = torch.where(p.targets == IGNORE, IGNORE, number[p.targets.clamp(min=0)])
    small = Problem(p.hidden, p.weight[keep], p.bias[keep], targets, p.options)
    expected = check_stats(small, backend=backend)
    p.bias[masked] = -torch.inf
    leaves = p.leaves()
    stats = gem_kernels.linear_token_stats(targets=p.targets, **leaves, **p.options, backend=backend)
    got = stats_and_gradients(stats, leaves, p.targets.shape)
    for name in ("weight", "bias"):
        assert torch.equal(got[name][masked], torch.zeros_like(got[name][masked]))
        got[name] = got[name][keep]
    for name, value in expected.items():
        assert distance(got[name], value) < 1e-5, name


@pytest.mark.parametrize("shape", [(0,), (2, 0), (4,)], ids=["no row", "no column", "all ignored"])
def test_nothing_to_do_gives_zeros(shape, device):
    p = problem(*shape, ignored=2.0, device=device)
    got = check_stats(p)
    assert all(not value.detach().any() for value in got.values())


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_ignored_rows_may_hold_nan(backend, device):
    needs_backend(backend, device)
    p = problem(12, ignored=0.5, device=device)
    clean = check_stats(p, backend=backend)
    ignored = p.targets == IGNORE
    assert ignored.any() and not ignored.all()
    p.hidden[ignored] = torch.nan
    leaves = p.leaves()
    stats = gem_kernels.linear_token_stats(targets=p.targets, **leaves, backend=backend)
    for name, value in stats_and_gradients(stats, leaves, p.targets.shape).items():
        assert torch.equal(value, clean[name]), name


def test_strided_inputs(device):
    p = problem(6, 5, device=device)
    expected = check_stats(p)
    hidden = p.hidden.transpose(0, 1).contiguous().transpose(0, 1)
    weight = p.weight.t().contiguous().t()
    strided = Problem(hidden, weight, torch.stack([p.bias, p.bias], 1)[:, 0], p.targets, {})
    for name, value in check_stats(strided).items():
        assert distance(value, expected[name]) < 1e-6, name


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_chunks_of_few_rows_keep_their_digits(rows, device):
    """BLAS adds the V terms of such products one after the other, and dHidden is a difference of large sums."""
    N, V, D = 6, 49152, 16
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, D, device=device, generator=generator)
    weight = 0.05 * torch.randn(V, D, device=device, generator=generator) + 0.02
    targets = torch.arange(N, device=device)
    grads = []
    for dtype in (torch.float32, torch.float64):
        h = hidden.to(dtype, copy=True).requires_grad_()
        if dtype == torch.float32:
            loss = gem_kernels.linear_token_stats(h, weight, targets, workspace_bytes=4 * V * rows).logprobs.sum()
        else:
            loss = torch.log_softmax(h @ weight.double().t(), -1).gather(-1, targets[:, None]).sum()
        loss.backward()
        grads.append(h.grad.double())
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) < 4e-6


def test_int32_targets(device):
    p = problem(6, device=device)
    p32 = Problem(p.hidden, p.weight, p.bias, p.targets.int(), {})
    stats = [gem_kernels.linear_token_stats(q.hidden, q.weight, q.targets).logprobs for q in (p, p32)]
    assert torch.equal(*stats)


# Padded and packed sequences: the entropy score from hidden states.


@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_fused_linear_entropy_score(backend, layout, device):
    needs_backend(backend, device)
    p, layout = sequences(device)[layout]
    results = []
    for kind in (torch.float32, torch.float64):
        leaves = p.leaves(kind)
        if kind == torch.float32:
            out = gem_kernels.fused_linear_entropy_score(
                targets=p.targets, **leaves, **layout, backend=backend, workspace_bytes=room(203, 7)
            )
            stats = out
        else:
            logits, _ = p.eager(kind, **leaves)
            counted = p.targets
            if "completion_mask" in layout:
                counted = counted.masked_fill(~layout["completion_mask"], IGNORE)
            stats = reference.token_stats(logits, counted)
            span = dict(layout)
            group_size = span.pop("group_size")
            scores = reference.entropy_scores(stats.entropy.detach(), **span)
            advantages = reference.group_advantages(scores.score, group_size, valid=scores.valid)
            out = scores
        got = stats_and_gradients(stats, leaves, p.targets.shape)
        got |= {"score": out.score, "final": out.final_entropy, "fork": out.fork_entropy}
        got["advantages"] = out.advantages if kind == torch.float32 else advantages
        assert out.valid.tolist() == [True, True, True, False, True, True]
        results.append(got)
    for name, exact in results[1].items():
        assert distance(results[0][name], exact) < 3e-6, name
    per_group = results[0]["advantages"].view(-1, 3).sum(1)
    assert per_group.abs().max() < 1e-6


# What is made, and what is multiplied.


PATHS = ("stats", "score", "sega, given advantages", "sega, two phase", "policy")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"logits_dtype": torch.float32}),
        (torch.float32, {"backend": "torch"}),
    ],
    ids=["fp32", "bf16", "bf16, fp32 logits", "plain torch"],
)
def test_no_tensor_outgrows_the_workspace(path, dtype, options, device):
    """Whatever N. dHidden, dWeight and the vectors of N are below the bound themselves."""
    workspace_bytes = 1 << 17
    largest = []
    for N in (45, 180):
        p = problem(N, V=3001, D=9, dtype=dtype, device=device, seed=N)
        leaves = p.leaves()
        functions = paths(p, leaves | options, workspace_bytes)
        with Recorder() as recorder:
            functions[path]().backward()
        largest.append(max(recorder.made))
        assert largest[-1][0] <= workspace_bytes, largest
        assert all(leaf.grad is not None for leaf in leaves.values())
    assert largest[0][0] == largest[1][0], largest


def test_a_weight_is_converted_in_slices(device):
    """bf16 operands, float32 logits on the CPU: no float32 copy of the weight."""
    p = problem(50, V=3001, D=100, dtype=torch.bfloat16, device=device)
    with torch.no_grad(), Recorder() as recorder:
        gem_kernels.linear_token_stats(
            p.hidden, p.weight, p.targets, logits_dtype=torch.float32, workspace_bytes=1 << 17
        )
    assert max(recorder.made)[0] <= 1 << 17


GEMMS = {
    "stats": {"all": 4, "hidden": 3, "weight": 3, "none": 1},
    "score": {"all": 4, "hidden": 3, "weight": 3, "none": 1},
    "sega, given advantages": {"all": 3, "hidden": 2, "weight": 2, "none": 1},
    "sega, two phase": {"all": 4, "hidden": 2, "weight": 3, "none": 1},
    "policy": {"all": 3, "hidden": 2, "weight": 2, "none": 1},
}


@pytest.mark.parametrize("needed", ["all", "hidden", "weight", "none"])
@pytest.mark.parametrize("path", PATHS)
def test_products_and_buffers_are_only_those_needed(path, needed, device):
    """`needed` is what wants a gradient."""
    N, V, D, rows = 60, 301, 24, 7
    p = problem(N, V=V, D=D, bias=False, ignored=0.0, device=device)
    leaves = p.leaves()
    for name, leaf in leaves.items():
        leaf.requires_grad_(needed in ("all", name))
    functions = paths(p, leaves, room(V, rows))
    with Recorder() as recorder:
        loss = functions[path]()
        assert loss.requires_grad == (needed != "none")
        if needed != "none":
            loss.backward()
    # Two phase within a group: its last chunk's logits are still there.
    saved = path == "sega, two phase" and needed in ("all", "weight")
    assert recorder.products == GEMMS[path][needed] * math.ceil(N / rows) - saved
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (needed in ("all", name))
    if leaves["weight"].grad is None:
        assert (V, D) not in [shape for _, _, shape in recorder.made]
    if leaves["hidden"].grad is None:
        assert (N, D) not in [shape for _, _, shape in recorder.made]


@pytest.mark.parametrize("path", PATHS)
def test_no_grad_makes_the_logits_once(path, device):
    p = problem(20, V=301, D=24, bias=False, ignored=0.0, device=device)
    functions = paths(p, p.leaves(), room(301, 5))
    with torch.no_grad(), Recorder() as recorder:
        assert not functions[path]().requires_grad
    assert recorder.products == 4
    assert not {(301, 24), (20, 24)} & {shape for _, _, shape in recorder.made}


LONG = """
import resource, torch, gem_kernels
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def run(N, V):
    hidden, weight = torch.randn(N, 64), torch.randn(V, 64)
    out = gem_kernels.linear_token_stats(hidden, weight, torch.zeros(N, dtype=torch.int64))
    assert out.entropy.isfinite().all()
    return 4 * (hidden.numel() + weight.numel())
run(64, 1000)
before = peak()
inputs = run(2048, 152_064)
print(peak() - before - inputs)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_resident_memory_of_many_rows():
    """Logits of 1.25 GB (float32). bench/linear_head.py --long has 65,536 rows."""
    out = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 64 * 2**20 + 32 * 2**20


def test_second_derivatives_are_refused(device):
    p = problem(5, device=device)
    leaves = p.leaves()
    stats = gem_kernels.linear_token_stats(targets=p.targets, **leaves)
    upstream = torch.ones_like(stats.entropy).requires_grad_()
    (grad,) = torch.autograd.grad(stats.entropy, leaves["hidden"], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


BAD = {
    "hidden": [None, torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 0)],
    "weight": [None, torch.zeros(7, 5), torch.zeros(7, 4, dtype=torch.bfloat16), torch.zeros(4), torch.zeros(0, 4)],
    "targets": [
        None,
        torch.zeros(3),
        torch.zeros(4, dtype=torch.int64),
        torch.tensor([0, 7, 1]),
        torch.tensor([-1] * 3),
    ],
    "bias": [0.0, torch.zeros(6), torch.zeros(7, dtype=torch.bfloat16)],
    "temperature": [0.0, -1.0, math.nan, "1", torch.zeros(3), torch.ones(2), torch.ones(3, dtype=torch.int64)],
    "softcap": [0.0, -1.0, math.inf, "1"],
    "logit_scale": [0.0, -1.0, math.nan, None],
    "ignore_index": [1.0, True, None],
    "logits_dtype": [torch.bfloat16, "float32"],
    "workspace_bytes": [0, -1, 1.5],
    "backend": ["cuda", None],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD.items() for value in values])
def test_bad_input_names_the_argument(name, value):
    for function, rest in (
        (gem_kernels.linear_token_stats, {}),
        (gem_kernels.fused_linear_policy_loss, {"token_loss": policy}),
        (gem_kernels.fused_linear_entropy_score, SPAN),
        (gem_kernels.fused_linear_sega_loss, SPAN),
    ):
        function(**good(), **rest)
        with pytest.raises(ValueError, match=f"^`{name}` must be .*, got "):
            function(**(good() | {name: value}), **rest)
