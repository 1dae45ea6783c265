"""`compute_dtype` and autocast: the products of a head in another dtype than hidden states, weight or bias."""

from __future__ import annotations

import pytest
import torch

import gem_kernels
from bench.counts import META, Counter, standing_in
from gem_kernels import reference
from tests.kernels.helpers import (
    IGNORE,
    Recorder,
    assert_all_within_budget,
    assert_near,
    distance,
    good,
    paths,
    problem,
    room,
    stats_and_gradients,
)
from tests.kernels.test_counts import CALLS

pytestmark = pytest.mark.usefixtures("one_thread")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# hidden, weight, bias, compute_dtype
MIXES = {
    "bfloat16 hidden, float32 head": (BF16, F32, F32, BF16),
    "float32 hidden, bfloat16 head": (F32, BF16, F32, F32),
    "all float32 in bfloat16": (F32, F32, BF16, BF16),
    "bfloat16 hidden in float32": (BF16, F32, F32, F32),
    "float16": (F16, F32, F16, F16),
    "bfloat16 head in float16": (F32, BF16, F32, F16),
}
V, D, N = 400, 16, 60
# Of a chunk: where its workspace has no room for a copy of the weight, where it has, and where it has for all rows.
ROWS = {"slices": 2, "whole": 20, "one chunk": N}
PATHS = [(path, rows) for path in ("stats", "policy") for rows in ROWS]
PATHS += [("sega, two phase", "slices"), ("sega, two phase", "whole"), ("sega, given advantages", "slices")]
PATHS += [("score", "whole")]
EPS = {F32: 2.0**-23, BF16: 2.0**-8, F16: 2.0**-11}


def mixed(mix: str, device="cpu", **options):
    """A problem whose tensors have these dtypes, and compute_dtype."""
    *dtypes, compute = MIXES[mix]
    p = problem(N, V=V, D=D, device=device, ignored=0.0, **options)
    p.hidden, p.weight, p.bias = (x.to(dtype) for x, dtype in zip((p.hidden, p.weight, p.bias), dtypes))
    return p, compute


def result(p, path, bytes_, given, **options) -> dict:
    """The loss of one of `paths`, and gradients in the dtype of `p`'s tensors. given: what leaves are made into."""
    leaves = p.leaves()
    loss = paths(p, {k: given(v) for k, v in leaves.items()} | options, bytes_)[path]()
    loss.backward()
    return {"loss": loss.detach(), **{k: v.grad for k, v in leaves.items()}}


@pytest.mark.parametrize(("path", "rows"), PATHS)
@pytest.mark.parametrize("mix", MIXES)
def test_as_if_the_caller_had_converted(mix, path, rows, device):
    """The numbers of tensors converted by hand; but gradients are not rounded to compute_dtype on their way."""
    p, compute = mixed(mix, device)
    bytes_ = room(V, ROWS[rows], compute)
    want = result(p, path, bytes_, lambda x: x.to(compute))
    got = result(p, path, bytes_, lambda x: x, compute_dtype=compute)
    assert_near(got["loss"], want["loss"])
    for name in ("hidden", "weight", "bias"):
        own = getattr(p, name).dtype
        assert got[name].dtype == own
        assert_near(got[name], want[name], 2 * max(EPS[own], EPS[compute]) + 2.0**-16, name)
        if own == F32 and compute != F32:
            assert (got[name].to(compute) != got[name]).sum() > got[name].numel() / 2, name


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("logits_dtype", [None, F32], ids=["", "float32 logits"])
@pytest.mark.parametrize("mix", MIXES)
def test_against_float64(mix, logits_dtype, rows, device):
    """Truth: float64 on the tensors as given. Budget: twice the error of F.linear in this dtype, plus rounding."""
    p, compute = mixed(mix, device, softcap=20.0, temperature=torch.rand(N) + 0.5)
    leaves = p.leaves()
    options = {"workspace_bytes": room(V, ROWS[rows], compute), "logits_dtype": logits_dtype, "compute_dtype": compute}
    stats = gem_kernels.linear_token_stats(targets=p.targets, **leaves, **p.options, **options)
    found = [stats_and_gradients(stats, leaves, p.targets.shape)]
    for kind in (compute, torch.float64):
        leaves = p.leaves() if kind == compute else p.leaves(kind)
        logits, more = p.eager(torch.promote_types(kind, F32), **{k: v.to(kind) for k, v in leaves.items()})
        stats = reference.token_stats(logits, p.targets, **more)
        found.append(stats_and_gradients(stats, leaves, p.targets.shape))
    assert_all_within_budget(*found, compute)


@pytest.mark.parametrize(("path", "rows"), PATHS)
def test_autocast_is_compute_dtype(path, rows, device):
    """As for F.linear; a given dtype goes before it, and then autocast changes nothing. Backward may run outside."""
    p = problem(N, V=V, D=D, device=device, bias=False, ignored=0.0)
    bytes_ = room(V, ROWS[rows], BF16)

    def cast(**options):
        leaves = p.leaves()
        with torch.autocast(device.type, BF16):
            loss = paths(p, leaves | options, bytes_)[path]()
        loss.backward()
        return {"loss": loss.detach(), **{k: v.grad for k, v in leaves.items()}}

    given = result(p, path, bytes_, lambda x: x, compute_dtype=BF16)
    for name, want in given.items():
        assert torch.equal(cast()[name], want), name
        assert torch.equal(cast(compute_dtype=BF16)[name], want), name
    float32 = result(p, path, bytes_, lambda x: x)
    assert not torch.equal(float32["loss"], given["loss"])
    assert all(torch.equal(cast(compute_dtype=F32)[name], want) for name, want in float32.items())


def test_the_log_probs_of_f_linear_under_autocast(device):
    p = problem(N, V=V, D=D, device=device, bias=False, ignored=0.0)
    with torch.autocast(device.type, BF16):
        logits = torch.nn.functional.linear(p.hidden, p.weight)
        got = gem_kernels.linear_token_stats(p.hidden, p.weight, p.targets)
    want = reference.token_stats(logits.double(), p.targets)
    assert logits.dtype == BF16 and distance(got.logprobs, want.logprobs) < 1e-5


def test_a_frozen_head_of_another_dtype(device):
    p, compute = mixed("bfloat16 hidden, float32 head", device)
    hidden = p.hidden.clone().requires_grad_()
    options = {"targets": p.targets, "token_loss": lambda logprobs, entropy: (logprobs + entropy).sum()}
    gem_kernels.fused_linear_policy_loss(hidden, p.weight, compute_dtype=compute, **options).loss.backward()
    want = p.hidden.clone().requires_grad_()
    gem_kernels.fused_linear_policy_loss(want, p.weight.to(compute), **options).loss.backward()
    assert_near(hidden.grad, want.grad, 2.0**-8)
    assert p.weight.grad is None


@pytest.mark.parametrize("backward", [False, True])
def test_one_copy_of_the_weight_or_slices_within_the_workspace(backward):
    """Beside the float32 gradient of the weight; and no copy waits for backward."""
    words = 4096
    p = problem(8, V=words, D=D, bias=False, ignored=0.0)
    copy = words * D * BF16.itemsize
    for bytes_, copies in ((copy, 1), (copy - 1, 0)):
        leaves = p.leaves()
        with Recorder() as recorder:
            stats = gem_kernels.linear_token_stats(
                targets=p.targets, workspace_bytes=bytes_, compute_dtype=BF16, **leaves
            )
            if backward:
                stats.logprobs.sum().backward()
        made = [(size, shape) for size, _, shape in recorder.made]
        assert made.count((copy, (words, D))) == copies * (1 + backward)
        assert made.count((2 * copy, (words, D))) == backward
        assert max(size for size, shape in made if shape != (words, D)) <= bytes_


@pytest.mark.parametrize("logits_dtype", [None, F32], ids=["", "float32 logits"])
@pytest.mark.parametrize("chunk", ["slices", "whole", "one chunk"])
@pytest.mark.parametrize("mix", MIXES)
def test_a_gpu_s_way_on_meta_tensors(mix, chunk, logits_dtype):
    """It runs, waits for nothing, makes gradients of the right dtype, and no more products than without."""
    *dtypes, compute = MIXES[mix]
    words, width = 5000, 32
    copy = words * width * compute.itemsize
    bytes_ = {"slices": copy // 3, "whole": copy, "one chunk": words * N * 16}[chunk]
    options = {"workspace_bytes": bytes_, "compute_dtype": compute, "logits_dtype": logits_dtype}
    for name, products in (("stats", 4), ("policy", 3)):
        shapes = ((N, width), (words, width), (words,))
        leaves = [torch.empty(s, dtype=d, device=META, requires_grad=True) for s, d in zip(shapes, dtypes)]
        given = dict(zip(("hidden", "weight", "bias"), leaves)) | {
            "targets": torch.empty(N, dtype=torch.int64, device=META)
        }
        with standing_in(), Counter(N, words, width, strict=True) as counter:
            CALLS[name](**given, **options).backward()
        assert counter.products == pytest.approx(products, rel=0.02)
        assert [x.grad.dtype for x in leaves] == dtypes


BAD = {
    "a float32 weight": ({"weight": torch.zeros(7, 4)}, r"`weight` must be of .*hidden.*compute_dtype .*torch.float32"),
    "a float32 bias": ({"bias": torch.zeros(7)}, r"`bias` must be of .*hidden.*compute_dtype .*torch.float32"),
    "float64": ({"compute_dtype": torch.float64}, r"`compute_dtype` must be None or torch.float32 or .*torch.float64"),
    "a string": ({"compute_dtype": "bfloat16"}, r"`compute_dtype` must be .*bfloat16"),
    "a float64 weight": (
        {"compute_dtype": F32, "weight": torch.zeros(7, 4).double()},
        r"`weight` must be of dtype torch.float32 or .*torch.float64",
    ),
    "logits_dtype": (
        {"compute_dtype": F16, "logits_dtype": BF16},
        r"`logits_dtype` must be torch.float16 or torch.float32, got torch.bfloat16",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    more, message = BAD[case]
    given = {k: v.to(BF16) if v.is_floating_point() else v for k, v in good().items()} | more
    with pytest.raises(ValueError, match="^" + message):
        gem_kernels.linear_token_stats(**given)
    if case in ("a float32 weight", "a float32 bias"):  # autocast says what to multiply in
        with torch.autocast("cpu", BF16):
            gem_kernels.linear_token_stats(**given)


def test_ignored_rows_and_no_rows(device):
    p, compute = mixed("bfloat16 hidden, float32 head", device)
    p.targets[::2] = IGNORE
    got = result(p, "stats", 1 << 20, lambda x: x, compute_dtype=compute)
    assert not got["hidden"][::2].any() and got["hidden"][1::2].any()
    p.targets[:] = IGNORE
    got = result(p, "stats", 1 << 20, lambda x: x, compute_dtype=compute)
    assert not any(x.any() for x in got.values())
