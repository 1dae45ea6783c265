"""token_stats on every backend against the reference in float64; Triton under its interpreter without a GPU."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import gem_kernels
from gem_kernels import logit_stats, reference
from gem_kernels.backends.rows import row_view
from gem_kernels.backends.types import RowGradients, RowOptions
from tests.kernels.helpers import BACKENDS, DTYPES, IGNORE, backward, check, empty_stats, make, upstream

pytestmark = pytest.mark.usefixtures("poisoned_empty")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# V: one, two, fewer than a vector; below and at a power of two; a block less and plus one (bf16 8,192; fp32 4,096);
# several blocks and an odd rest.
@each_backend
@each_dtype
@pytest.mark.parametrize("V", [1, 2, 7, 1000, 1024, 4097, 8191, 8193, 9001])
def test_matches_float64(V, dtype, backend, device):
    check(*make(3, V, dtype=dtype, device=device), backend=backend)


@each_backend
@pytest.mark.parametrize("use", ["logprobs", "entropy"])
def test_gradient_through_one_output_alone(use, backend, device):
    check(*make(3, 1000, device=device), backend=backend, use=use)


@each_backend
@pytest.mark.parametrize("shape", [(50,), (1, 50), (3, 50), (2, 3, 50), (1, 1, 50), (2, 1, 2, 50)])
def test_any_number_of_leading_axes(shape, backend, device):
    stats, _ = check(*make(*shape, device=device), backend=backend)
    assert stats.logprobs.shape == stats.entropy.shape == shape[:-1]


@each_backend
@pytest.mark.parametrize("shape", [(0, 50), (0, 3, 50), (3, 0, 50)])
def test_no_rows(shape, backend, device):
    stats, logits = check(*make(*shape, device=device), backend=backend)
    assert stats.entropy.shape == shape[:-1] and logits.grad.shape == shape


def strided_cases():
    """name, shape of the memory, view of it. Odd V puts the rows at every alignment."""
    return {
        "all but the last": ((2, 3, 301), lambda x: x[:, :-1]),
        "all but the first": ((2, 3, 301), lambda x: x[:, 1:]),
        "batch and time exchanged": ((3, 2, 301), lambda x: x.transpose(0, 1)),
        "every second row": ((2, 4, 301), lambda x: x[:, ::2]),
        "part of the vocabulary": ((2, 2, 400), lambda x: x[..., 3:304]),
        "one row for all": ((1, 301), lambda x: x.expand(4, 301)),
        "one sequence for all": ((1, 2, 301), lambda x: x.expand(2, 2, 301)),
        "strided vocabulary": ((3, 602), lambda x: x[:, ::2]),
        "vocabulary first": ((301, 3), lambda x: x.t()),
        "off by one element": ((3 * 301 + 1,), lambda x: x[1:].view(3, 301)),
        "four axes, none mergeable": ((2, 2, 3, 301), lambda x: x.transpose(1, 2)[:, :, :1]),
        "four axes, transposed": ((2, 2, 3, 7), lambda x: x.permute(2, 1, 0, 3)),
    }


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", strided_cases())
def test_strides(case, dtype, backend, device):
    shape, view = strided_cases()[case]
    memory, _ = make(*shape, dtype=dtype, device=device)
    logits = view(memory)
    targets = torch.arange(math.prod(logits.shape[:-1]), device=device).view(logits.shape[:-1]) * 37 % logits.shape[-1]
    before = memory.clone()
    check(logits, targets, backend=backend)
    assert torch.equal(memory, before)


@each_backend
@each_dtype
def test_strided_rows_past_a_block(dtype, backend, device):
    """Every row at another alignment, with whole blocks, an edge on both sides and a tail."""
    memory, _ = make(2, 3, 9001, dtype=dtype, device=device)
    targets = torch.tensor([[0, 9000], [8195, 3]], device=device)
    check(memory[:, 1:], targets, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", strided_cases())
def test_stores_of_the_gradient_are_as_wide_as_loads(case, dtype):
    """Counted in machine code: 7.9 instructions an element where the two lie alike in memory, 13.1 elsewhere."""
    launch = pytest.importorskip("gem_kernels.backends.triton.launch")
    shape, view = strided_cases()[case]
    logits = view(torch.zeros(shape, dtype=dtype))
    grad = logit_stats._gradient_like(logits)
    assert grad.shape == logits.shape and grad.dtype == dtype
    rows, into = row_view(logits), row_view(grad)
    rows = row_view(logits.contiguous()) if rows is None else rows
    assert into.shape == rows.shape, "they are walked together"
    align = 16 // dtype.itemsize
    (memory, base), (grad_memory, grad_base) = launch._from_boundary(rows), launch._from_boundary(into)
    assert memory.data_ptr() % 16 == grad_memory.data_ptr() % 16 == 0 and 0 <= base < align
    assert launch._alike((grad_base, *into.stride()), (base, *rows.stride()), align)
    assert (
        grad.untyped_storage().nbytes()
        <= (logits.numel() + align * (rows.shape[0] * rows.shape[1] + 1)) * dtype.itemsize
    )
    assert not launch._alike((0, 301), (1, 301), align) and not launch._alike((0, 300), (0, 301), align)


TEMPERATURES = {
    "a float": 0.7,
    "an int": 2,
    "per token": torch.tensor([[0.3, 1.0, 1.7], [0.9, 30.0, 0.05]]),
    "per sequence": torch.tensor([[0.5], [2.0]]),
    "per position": torch.tensor([0.5, 1.0, 2.0]),
    "0-d": torch.tensor(0.7),
    "bf16": torch.tensor([[0.5], [1.5]], dtype=torch.bfloat16),
    "float64": torch.tensor([[0.5], [1.5]], dtype=torch.float64),
}


@each_backend
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_temperature_and_softcap(temperature, softcap, backend, device):
    tau = TEMPERATURES[temperature]
    tau = tau.to(device) if isinstance(tau, torch.Tensor) else tau
    check(*make(2, 3, 333, scale=6.0, device=device), temperature=tau, softcap=softcap, backend=backend)


@pytest.mark.parametrize("c", [5.0, 30.0, 50.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_budget_of_the_approximate_softcap(sign, c):
    """As the GPU computes it: ex2.approx is off by up to 2^-22, rcp.approx by 2^-23 (PTX ISA), here all to one side.

    A logit within five float32 roundings of c, which is what `check` allows; a slope within eight of 1.
    """
    x = torch.cat([torch.linspace(-6 * c, 6 * c, 40_001), torch.tensor([-1e4, -1.0, -1e-3, 0.0, 1e-3, 1e4])])
    e = (x * (2 / math.log(2) / c)).exp2() * (1 + sign * 2.0**-22)
    r = (1 / (1 + e)) * (1 - sign * 2.0**-23)
    u = (x.double() / c).tanh()
    assert ((c - 2 * c * r).double() - c * u).abs().max() <= 5 * 2.0**-23 * c
    assert ((4 * (r - r * r)).double() - (1 - u * u)).abs().max() <= 8 * 2.0**-23


@each_backend
@each_dtype
def test_softcap_with_masked_words(dtype, backend, device):
    """A masked word stays masked under the softcap, and has slope 1: as target it gets dL/dlogprob / temperature."""
    logits, targets = make(2, 4200, dtype=dtype, scale=20.0, device=device)
    logits[:, 100:4190:3] = -torch.inf
    targets[:] = torch.tensor([100, 5])
    check(logits, targets, temperature=0.7, softcap=30.0, backend=backend)


@each_backend
@each_dtype
@pytest.mark.parametrize("inplace", [False, True])
def test_ignored_rows_are_never_read(inplace, dtype, backend, device):
    logits, targets = make(2, 3, 700, dtype=dtype, device=device)
    logits[0, 1], logits[1, 2] = torch.nan, torch.inf
    targets[0, 1] = targets[1, 2] = IGNORE
    stats, z = check(logits, targets, backend=backend, inplace_backward=inplace)
    for x in (stats.logprobs, stats.entropy, z.grad.abs().sum(-1)):
        assert x[0, 1] == 0 and x[1, 2] == 0 and x.isfinite().all()


@each_backend
def test_another_ignore_index_and_int32_targets(backend, device):
    logits, targets = make(4, 90, device=device)
    logits[2] = torch.nan
    targets[2] = 5
    targets[[0, 1, 3]] = torch.tensor([0, 89, 4], device=device)
    stats, _ = check(logits, targets, ignore_index=5, backend=backend)
    assert stats.entropy[2] == 0
    other = gem_kernels.token_stats(logits, targets.int(), ignore_index=5, backend=backend)
    assert torch.equal(other.logprobs, stats.logprobs)


@each_backend
def test_all_rows_ignored(backend, device):
    logits = torch.full((3, 40), torch.nan, device=device)
    check(logits, torch.full((3,), IGNORE, device=device), backend=backend)


@each_backend
@each_dtype
def test_minus_infinity_is_probability_zero(dtype, backend, device):
    logits, targets = make(5, 9000, dtype=dtype, device=device)
    logits[0, ::2] = -torch.inf
    logits[1, :8192] = -torch.inf  # whole blocks before the first number
    logits[2, 4096:] = -torch.inf  # and after the last
    logits[3, 1:] = -torch.inf  # one word left
    logits[4, 17] = -torch.inf  # the target itself
    targets[:] = torch.tensor([1, 8999, 4, 0, 17])
    stats, z = check(logits, targets, backend=backend)
    assert stats.logprobs[4] == -torch.inf and z.grad.isfinite().all()
    assert stats.logprobs[3] == 0 and stats.entropy[3] == 0
    masked = logits == -torch.inf
    masked[4, 17] = False
    assert (z.grad[masked] == 0).all()


@each_backend
@pytest.mark.parametrize("V", [300, 5000])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nan_and_infinity_stay_in_their_row(softcap, V, backend, device):
    logits, targets = make(6, V, device=device)
    clean = gem_kernels.token_stats(logits, targets, softcap=softcap, backend=backend)
    logits[1, V // 2] = torch.nan
    logits[2, V - 1] = torch.inf
    logits[3] = -torch.inf
    logits[4], logits[4, 0] = -torch.inf, torch.nan
    bad = torch.tensor([False, True, True, True, True, False])
    logits.requires_grad_()
    stats = gem_kernels.token_stats(logits, targets, softcap=softcap, backend=backend)
    for got, before in ((stats.logprobs, clean.logprobs), (stats.entropy, clean.entropy)):
        assert got[bad].isnan().all() and torch.equal(got[~bad], before[~bad])
    backward(stats, *upstream(targets.shape, device=device))
    assert logits.grad[bad].isnan().all() and logits.grad[~bad].isfinite().all()


@each_backend
@pytest.mark.parametrize("scale,shift", [(0.0, 0.0), (1e-3, 0.0), (1.0, 1e4), (1.0, -1e4), (1e4, 0.0), (100.0, -1e4)])
def test_scales(scale, shift, backend, device):
    """Equal logits, huge ones, all negative ones."""
    logits, targets = make(3, 900, scale=scale, device=device)
    check(logits + shift, targets, backend=backend)


@each_backend
def test_maximum_that_moves_in_every_block(backend, device):
    rising = torch.linspace(-30, 10, 12_500, device=device)
    logits = torch.stack([rising, rising.flip(0)])
    check(logits, torch.tensor([12_499, 9000], device=device), backend=backend)


@each_backend
@each_dtype
@pytest.mark.parametrize("place", [0, 20_000, 49_999])
def test_confident_row(place, dtype, backend, device):
    """One logit 40 above 50,000 others: H is about 1e-11. lse - sum p z in fp32 has no digit of it right."""
    logits = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(0)).mul(0.1).to(dtype)
    logits[0, place] = 40.0
    others = torch.arange(50_000) != place
    z = logits[0].double()
    rest = z.softmax(0)[others].sum()
    exact = -(z.softmax(0) * z.log_softmax(0))[others].sum() - torch.log1p(-rest)
    z32 = logits[0].float()
    naive = z32.logsumexp(0) - (z32.softmax(0) * z32).sum()
    assert (naive.double() - exact).abs() > 0.5 * exact
    leaf = logits.to(device).requires_grad_()
    stats = gem_kernels.token_stats(leaf, torch.tensor([place], device=device), backend=backend)
    torch.testing.assert_close(stats.entropy[0].double().cpu(), exact, rtol=1e-3, atol=0)
    torch.testing.assert_close(stats.logprobs[0].double().cpu(), torch.log1p(-rest), rtol=1e-3, atol=0)


# Laws.


@each_backend
@each_dtype
def test_entropy_of_equal_logits_is_the_logarithm_of_their_number(dtype, backend, device):
    for V, kept in ((1, 1), (2, 2), (777, 777), (5000, 5000), (5000, 13)):
        logits = torch.full((1, V), -torch.inf, dtype=dtype, device=device)
        logits[:, V - kept :] = 1.25
        stats = gem_kernels.token_stats(logits, torch.tensor([V - 1], device=device), backend=backend)
        torch.testing.assert_close(stats.entropy.item(), math.log(kept), rtol=1e-6, atol=0)
        torch.testing.assert_close(stats.logprobs.item(), -math.log(kept), rtol=1e-6, atol=0)


@given(
    rows=st.integers(1, 3),
    V=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.01, 1.0, 10.0, 300.0]),
    temperature=st.sampled_from([0.1, 1.0, 3.0, "rows"]),
    softcap=st.sampled_from([None, None, 2.0, 30.0]),
    masked=st.sampled_from([0.0, 0.5]),
    ignored=st.booleans(),
    offset=st.integers(0, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None, derandomize=True)
@each_backend
def test_any_input(backend, rows, V, dtype, scale, temperature, softcap, masked, ignored, offset, seed):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory, targets = make(rows, V + offset, dtype=dtype, scale=scale, seed=seed, device=device)
    generator = torch.Generator().manual_seed(seed)
    memory.masked_fill_((torch.rand(memory.shape, generator=generator) < masked).to(device), -torch.inf)
    logits, targets = memory[:, offset:], targets % V
    logits[:, seed % V] = 1.0  # a row keeps a word
    if ignored:
        targets[0] = IGNORE
    if temperature == "rows":
        temperature = torch.rand(rows, generator=generator).add(0.2).to(device)
    stats, z = check(logits, targets, temperature=temperature, softcap=softcap, backend=backend)
    slack = 1e-6 * (1 + math.log(V))
    assert (stats.entropy >= 0).all() and (stats.entropy <= math.log(V) + slack).all()
    assert (stats.logprobs <= slack).all()
    if softcap is None and dtype == torch.float32:
        # Adding a constant to a row changes nothing, so its gradient sums to zero.
        gradient = z.grad.double()
        tau = torch.as_tensor(temperature, device=device)
        terms = gradient.abs().sum(-1) + (upstream(targets.shape, device=device)[0] / tau).abs()
        assert (gradient.sum(-1).abs() <= 1e-6 * terms).all()


@each_backend
def test_without_grad_nothing_is_kept(backend, device):
    logits, targets = make(2, 50, device=device)
    with torch.no_grad():
        stats = gem_kernels.token_stats(logits.requires_grad_(), targets, backend=backend)
    assert not stats.logprobs.requires_grad and not stats.entropy.requires_grad


# Rows split over several programs.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("splits,softcap", [(2, None), (3, 4.0), (7, None)])
def test_split_rows_equal_whole_rows(softcap, splits, dtype, monkeypatch, device):
    """Blocks of 256, so that 1,501 columns are several to a split, unevenly, and some splits have none."""
    from gem_kernels.backends.triton import launch, row_stats

    align = 16 // dtype.itemsize
    monkeypatch.setattr(row_stats, "launch_options", lambda V, size: row_stats.Launch(256, 32 * align, align, 1))
    logits, targets = make(6, 1501, dtype=dtype, device=device)
    targets[:] = torch.tensor([0, 1500, 700, IGNORE, 260, 3])
    logits[1, :600] = -torch.inf  # a whole split of it
    logits[2, 3] = 50.0  # a confident row
    logits[3] = torch.nan  # ignored
    logits[4, 900] = torch.nan
    logits[5, 3] = -torch.inf  # the target
    tau = torch.tensor([1.0, 0.5, 1.0, 1.0, 1.0, 2.0], device=device)
    problem = (logits[None], targets, RowOptions(1.0, tau, softcap, IGNORE, "triton"))
    whole = launch.row_stats_forward(*problem, empty_stats(6, device), splits=1)
    split = launch.row_stats_forward(*problem, empty_stats(6, device), splits=splits)
    for got, want in zip(split, whole):
        # Row 2: what shares one of the 128 lanes with the maximum is rounded away, and the two cut lanes differently.
        rtol = torch.tensor([1e-5, 1e-5, 1 / 64, 0.0, 1e-5, 1e-5], device=device)
        close = (got == want) | ((got - want).abs() <= rtol * want.abs()) | (got.isnan() & want.isnan())
        assert close.all(), (got, want)
        assert got[4].isnan() or want[4].isfinite()
    assert whole[0][5] == -torch.inf and whole[1][3] == 0
    _, entropy, row_max, log_sum = whole
    stats = RowGradients(entropy, row_max, log_sum, *upstream(targets.shape, device=device))
    grads = [torch.empty_like(logits)[None] for _ in range(2)]
    launch.row_stats_backward(grads[0], *problem, stats, splits=1)
    launch.row_stats_backward(grads[1], *problem, stats, splits=splits)
    assert torch.equal(grads[0].nan_to_num(9.0), grads[1].nan_to_num(9.0))
    if splits != 2:  # as on AMD, where barriers do not order stores
        monkeypatch.setattr(launch, "ORDERED", False)
        launch.row_stats_backward(grads[1].fill_(0), *problem, stats, splits=splits)
        assert torch.equal(grads[0].nan_to_num(9.0), grads[1].nan_to_num(9.0))
        monkeypatch.setattr(launch, "ORDERED", True)
    if splits == 7:  # rows of the gradient that are not alike in memory
        apart = torch.empty(1, 6, 1502, dtype=dtype, device=device)[..., :1501]
        launch.row_stats_backward(apart, *problem, stats, splits=splits)
        assert torch.equal(apart.nan_to_num(9.0), grads[0].nan_to_num(9.0))
    launch.row_stats_backward(logits[None], *problem, stats, splits=splits)
    if splits == 2:  # the interpreter runs the splits in order, so in place is exercised, not raced
        assert torch.equal(logits[None].nan_to_num(9.0), grads[0].nan_to_num(9.0))


def test_splits_cover_every_column_once():
    launch = pytest.importorskip("gem_kernels.backends.triton.launch")
    for V in (1, 256, 257, 1501, 50_000):
        for splits in (1, 2, 3, 64):
            span = launch._span(V, 256, splits)
            assert span % 256 == 0 and span * splits >= V


# Memory and addresses.


class Allocations(TorchDispatchMode):
    """The largest result, in elements, that does not live in `known`'s memory.

    A dispatch mode is off while it handles an operator, so ours are entered by their Python bodies, with the mode on.
    """

    BODIES = {  # noqa: RUF012
        torch.ops.gem_kernels.row_stats.default: logit_stats.row_stats_op._init_fn,
        torch.ops.gem_kernels.row_stats_backward_.default: logit_stats.row_stats_backward_inplace_op._init_fn,
    }

    def __init__(self, known: torch.Tensor):
        super().__init__()
        self.known, self.largest = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.BODIES:
            with self:
                out = self.BODIES[function](*args, **(kwargs or {}))
        else:
            out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() != self.known:
                self.largest = max(self.largest, x.numel())
        return out


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_second_tensor_of_the_size_of_the_logits(dtype, backend, device):
    """Forward, and backward in place: at most an eighth of the logits at a time."""
    memory, _ = make(20, 3, 400, dtype=dtype, device=device)
    logits = memory[:, :1].requires_grad_() if backend == "triton" else memory[:, :-1].requires_grad_()
    targets = torch.ones(logits.shape[:-1], dtype=torch.int64, device=device)
    with Allocations(memory) as forward:
        stats = gem_kernels.token_stats(logits, targets, inplace_backward=True, backend=backend)
    a, b = upstream(targets.shape, device=device)
    with Allocations(memory) as backwards:
        torch.autograd.grad([stats.logprobs, stats.entropy], logits, [a, b])
    assert 0 < forward.largest <= logits.numel() // 8
    assert 0 < backwards.largest <= logits.numel() // 8
    with Allocations(memory) as copying:
        gem_kernels.token_stats(logits.detach().transpose(0, 1).clone(), targets.t(), backend=backend)
    assert copying.largest >= logits.numel(), "the count itself is broken"


@each_backend
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_more_than_2_to_the_31_elements_apart(axis, backend, tmp_path, device):
    """Two rows at the ends of a sparse file: addresses past int32 with no memory behind them."""
    if device.type == "cuda":
        pytest.skip("a sparse file is memory of the CPU")
    V, apart = 301, 2**31 + 64
    path = tmp_path / "sparse"
    with open(path, "wb") as f:
        f.truncate((apart + V) * 2)
    memory = torch.from_file(str(path), shared=True, size=apart + V, dtype=torch.bfloat16)
    logits = memory.as_strided(
        (2, 1, V) if axis == 0 else (1, 2, V), (apart, V, 1) if axis == 0 else (2 * apart, apart, 1)
    )
    plain, targets = make(*logits.shape, dtype=torch.bfloat16)
    logits.copy_(plain)
    _, z = check(logits, targets, backend=backend, inplace_backward=False)
    grad = z.grad.clone()
    _, z = check(logits, targets, backend=backend, inplace_backward=True)
    assert torch.equal(z.grad, grad) and torch.equal(memory[apart:].view(-1), grad.view(2, V)[1])
    assert os.stat(path).st_blocks * 512 < 2**24, "the file is not sparse: nothing else may have been written"


# Masked words: finfo.min, -1e30 and anything below count as -inf.


@each_backend
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("low", [torch.finfo(torch.bfloat16).min, -1e32, -1.01e30])
def test_a_word_masked_by_a_low_number_is_masked(low, dtype, softcap, backend, device):
    """To the bit what -inf gives: among others, as a target, and in a row of nothing else."""
    logits, targets = make(5, 1031, dtype=dtype, device=device)
    masked = torch.rand(logits.shape, generator=torch.Generator().manual_seed(4)) < 0.3
    masked[0] = False
    masked[2, :600] = True  # a whole block of it
    masked[3] = True
    masked[4] = True
    masked[4, 7] = False
    masked = masked.to(device).scatter(
        1, targets[:, None], torch.tensor([0, 1, 0, 1, 1], device=device)[:, None].bool()
    )
    results = []
    for number in (-torch.inf, low):
        leaf = logits.masked_fill(masked, number).requires_grad_()
        stats = gem_kernels.token_stats(leaf, targets, softcap=softcap, temperature=0.7, backend=backend)
        backward(stats, *upstream(targets.shape, device=device))
        results.append((stats.logprobs.detach(), stats.entropy.detach(), leaf.grad))
    for want, got in zip(*results):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    logprobs, entropy, grad = results[1]
    assert logprobs[1] == logprobs[4] == -torch.inf
    assert logprobs[3].isnan() and entropy[3].isnan() and grad[3].isnan().all()
    assert entropy[[0, 1, 2, 4]].isfinite().all()


@each_backend
def test_a_low_number_above_the_bound_is_a_logit(backend, device):
    """Just above -1e30 a row of nothing else is uniform, as any row of equal logits is."""
    logits = torch.full((2, 37), -0.99e30, device=device)
    stats = gem_kernels.token_stats(logits, torch.tensor([0, 36], device=device), backend=backend)
    torch.testing.assert_close(stats.entropy, torch.full_like(stats.entropy, math.log(37)), rtol=1e-6, atol=0)


def test_the_reference_has_the_same_rule():
    logits = torch.tensor([[1.0, -1e32, 2.0], [-1e32, -2e30, -torch.inf]], dtype=torch.float64, requires_grad=True)
    stats = reference.token_stats(logits, torch.tensor([1, 0]))
    assert stats.logprobs[0] == -torch.inf and stats.logprobs[1].isnan() and stats.entropy[1].isnan()
    assert abs(stats.entropy[0].item() - (math.log1p(math.e) - math.e / (1 + math.e))) < 1e-12
