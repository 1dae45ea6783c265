"""CPU row statistics, compiled and plain torch, against the reference in float64.

Budget: twice what eager torch errs in the same dtype on the same numbers, plus rounding of the result.
"""

from __future__ import annotations

import os
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gem_kernels import reference
from gem_kernels.backends.cpu import build, row_stats
from gem_kernels.backends.types import FLOOR, RowGradients, RowOptions
from tests.kernels.helpers import empty_stats

IGNORE = -100
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
HAS_COMPILER = build.load() is not None
PATHS = [pytest.param(True, id="compiled", marks=pytest.mark.skipif(not HAS_COMPILER, reason="no compiler"))]
PATHS.append(pytest.param(False, id="torch"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """torch.empty yields NaN, so an output that is not written fails."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def options(temperature=1.0, softcap=None, compiled: bool = True) -> RowOptions:
    number, rows = (1.0, temperature) if isinstance(temperature, Tensor) else (temperature, None)
    return RowOptions(number, rows, softcap, IGNORE, "cpu" if compiled else "torch")


def forward(logits: Tensor, targets: Tensor, temperature=1.0, softcap=None, *, compiled: bool):
    out = empty_stats(targets.shape[0])
    return row_stats.row_stats_forward(logits, targets, options(temperature, softcap, compiled), out)


def backward(logits, targets, a, b, temperature=1.0, softcap=None, *, compiled: bool, out=None, stats=None):
    _, entropy, row_max, log_sum = stats or forward(logits, targets, temperature, softcap, compiled=compiled)
    out = torch.empty(logits.shape, dtype=logits.dtype) if out is None else out
    vectors = RowGradients(entropy, row_max, log_sum, a, b)
    row_stats.row_stats_backward(out, logits, targets, options(temperature, softcap, compiled), vectors)
    return out


def truth(logits, targets, a, b, temperature, softcap, dtype):
    """(logprobs, entropy, gradient) by the reference and autograd, computed in `dtype`."""
    z = logits.to(dtype).detach().reshape(-1, logits.shape[-1]).requires_grad_()
    tau = temperature.to(dtype) if isinstance(temperature, Tensor) else temperature
    stats = reference.token_stats(z, targets, temperature=tau, softcap=softcap, ignore_index=IGNORE)
    torch.autograd.backward([stats.logprobs, stats.entropy], [a.to(dtype), b.to(dtype)])
    return stats.logprobs.detach(), stats.entropy.detach(), z.grad


def assert_within_budget(got: Tensor, exact: Tensor, torchs: Tensor, eps: float, rowwise: bool = False):
    """|got - exact| <= 2 |torch - exact| (worst of the row or of all) + 2 eps |exact| + eps * scale of the row."""
    got, torchs = got.double().view_as(exact), torchs.double().view_as(exact)
    special = ~exact.isfinite()
    torch.testing.assert_close(got[special], exact[special], rtol=0, atol=0, equal_nan=True)
    zero = torch.zeros((), dtype=torch.float64)
    err, torch_err = (torch.where(special, zero, (v - exact).abs()) for v in (got, torchs))
    size = torch.where(special, zero, exact.abs())
    if rowwise:
        torch_err, scale = torch_err.amax(-1, keepdim=True), size.amax(-1, keepdim=True)
    else:
        torch_err, scale = torch_err.max(), size.max()
    budget = 2 * torch_err + 2 * eps * size + 2.0**-23 * scale + 1e-37
    if eps == EPS[torch.float16]:
        budget = budget + 2.0**-25  # its subnormals
    assert (err <= budget).all(), f"error {err.max():.3g} is {(err / budget).max():.2f} times the budget"


def check(logits, targets, temperature=1.0, softcap=None, *, compiled, seed=0):
    """Forward and backward of one problem against float64."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(targets.shape[0], generator=generator) for _ in range(2))
    exact = truth(logits, targets, a, b, temperature, softcap, torch.float64)
    # Torch itself: upcast to float32, as every loss does, the gradient rounded to the dtype of the logits.
    torchs = truth(logits, targets, a, b, temperature, softcap, torch.float32)
    stats = forward(logits, targets, temperature, softcap, compiled=compiled)
    for got, want, theirs in zip(stats[:2], exact[:2], torchs[:2]):
        assert got.dtype == torch.float32
        assert_within_budget(got, want, theirs, EPS[torch.float32])
    grad = backward(logits, targets, a, b, temperature, softcap, compiled=compiled, stats=stats)
    assert grad.dtype == logits.dtype
    assert_within_budget(grad, exact[2], torchs[2].to(logits.dtype), EPS[logits.dtype], rowwise=True)


def problem(R1, R2, V, dtype=torch.float32, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(R1, R2, V, generator=generator) * scale).to(dtype)
    return logits, torch.randint(0, V, (R1 * R2,), generator=generator)


# V: one; below, at and past a vector (16) and an iteration (64); at and past a block (4096); two blocks and a tail.
@pytest.mark.parametrize("compiled", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 63, 64, 65, 1001, 4096, 4097, 4160, 9001])
def test_matches_float64(V, dtype, compiled):
    check(*problem(1, 5, V, dtype), compiled=compiled)


@pytest.mark.parametrize("compiled", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0, 30.0])
@pytest.mark.parametrize("per_row", [False, True])
def test_temperature_and_softcap(per_row, softcap, dtype, compiled):
    logits, targets = problem(2, 3, 5003, dtype, scale=10.0)
    temperature = torch.tensor([0.3, 0.7, 1.0, 1.3, 2.0, 50.0]) if per_row else 0.7
    check(logits, targets, temperature, softcap, compiled=compiled)


@pytest.mark.parametrize("compiled", PATHS)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 100.0, 1e30])
def test_scales(scale, compiled):
    check(*problem(1, 3, 6000, scale=scale), compiled=compiled)


@pytest.mark.parametrize("compiled", PATHS)
def test_maximum_that_moves_in_every_block(compiled):
    """Rising and falling ramps: every block, or none but the first, changes the running maximum."""
    rising = torch.linspace(-30, 10, 50_000)
    logits = torch.stack([rising, rising.flip(0), torch.zeros(50_000)])[None]
    check(logits, torch.tensor([49_999, 0, 7]), compiled=compiled)


@pytest.mark.parametrize("compiled", PATHS)
def test_one_row(compiled):
    check(*problem(1, 1, 300), compiled=compiled)


@pytest.mark.parametrize("compiled", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows(dtype, compiled):
    """logits[:, :-1], rows with a gap, and batch and time exchanged; the gradient has other strides."""
    whole, _ = problem(3, 5, 777, dtype)
    for logits in (whole[:, :-1], whole[:, ::2, 5:700], whole.transpose(0, 1)[1:]):
        R1, R2, V = logits.shape
        targets = torch.arange(R1 * R2) * 7 % V
        targets[1] = IGNORE
        check(logits, targets, compiled=compiled)
        plain = logits.contiguous()
        for x, y in zip(forward(logits, targets, compiled=compiled), forward(plain, targets, compiled=compiled)):
            assert torch.equal(x, y)
        a, b = torch.randn(R1 * R2), torch.randn(R1 * R2)
        buffer = torch.full((R1, R2 + 1, V + 3), 7.0, dtype=dtype)
        got = backward(logits, targets, a, b, compiled=compiled, out=buffer[:, :-1, 1 : V + 1])
        assert torch.equal(got, backward(plain, targets, a, b, compiled=compiled))
        buffer[:, :-1, 1 : V + 1] = 7.0
        assert (buffer == 7.0).all(), "wrote outside of its rows"


@pytest.mark.parametrize("compiled", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_minus_infinity_is_probability_zero(softcap, dtype, compiled):
    logits, targets = problem(1, 6, 9000, dtype)
    logits[0, 0, ::2] = -torch.inf
    logits[0, 1, :8192] = -torch.inf  # whole blocks before the first number
    logits[0, 2, 4096:] = -torch.inf  # and after the last
    logits[0, 3, 1:] = -torch.inf  # one word left: H = 0
    logits[0, 4, 17] = -torch.inf
    targets[:] = torch.tensor([1, 8999, 4, 0, 17, 5])  # row 4: the target itself has probability 0
    check(logits, targets, softcap=softcap, compiled=compiled)
    logprobs, entropy, *_ = forward(logits, targets, softcap=softcap, compiled=compiled)
    assert logprobs[3] == 0 and entropy[3] == 0 and logprobs[4] == -torch.inf
    grad = backward(logits, targets, torch.ones(6), torch.ones(6), 0.5, softcap, compiled=compiled)
    masked = logits == -torch.inf
    masked[0, 4, 17] = False
    assert (grad[masked] == 0).all() and grad[0, 4, 17] == 2.0


@pytest.mark.parametrize("compiled", PATHS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("place", [0, 4000, 8191, 8999])
def test_nan_and_infinity_stay_in_their_row(place, softcap, compiled):
    logits, targets = problem(1, 8, 9000)
    clean = forward(logits, targets, softcap=softcap, compiled=compiled)
    logits[0, 1, place] = torch.nan
    logits[0, 3, place] = torch.inf
    logits[0, 4] = -torch.inf
    logits[0, 5], logits[0, 5, place] = -torch.inf, torch.nan
    logits[0, 6], logits[0, 6, place], logits[0, 6, 8990] = -torch.inf, torch.nan, 1.0
    bad = torch.tensor([False, True, False, True, True, True, True, False])
    for stats, before in zip(forward(logits, targets, softcap=softcap, compiled=compiled), clean):
        assert torch.equal(stats[~bad], before[~bad])
    logprobs, entropy, _, log_sum = forward(logits, targets, softcap=softcap, compiled=compiled)
    for stats in (logprobs, entropy, log_sum):
        assert stats[bad].isnan().all()
    grad = backward(logits, targets, torch.ones(8), torch.zeros(8), softcap=softcap, compiled=compiled)
    assert grad[0, bad].isnan().all() and grad[0, ~bad].isfinite().all()


@pytest.mark.parametrize("compiled", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_are_zero_whatever_they_hold(dtype, compiled):
    logits, targets = problem(2, 4, 500, dtype)
    logits[0, 1], logits[1, 3] = torch.nan, torch.inf
    targets[[1, 7]] = IGNORE
    for stats in forward(logits, targets, compiled=compiled):
        assert (stats[[1, 7]] == 0).all() and stats.isfinite().all()
    grad = backward(logits, targets, torch.randn(8), torch.randn(8), compiled=compiled)
    assert (grad.view(8, -1)[[1, 7]] == 0).all() and grad.isfinite().all()
    targets[:] = IGNORE
    assert (forward(logits, targets, compiled=compiled)[1] == 0).all()


@pytest.mark.parametrize("compiled", PATHS)
def test_target_outside_the_vocabulary_is_nan(compiled):
    logits, targets = problem(1, 4, 100)
    targets[1], targets[2] = 100, -7
    logprobs, entropy, _, _ = forward(logits, targets, compiled=compiled)
    grad = backward(logits, targets, torch.ones(4), torch.ones(4), compiled=compiled)
    for x in (logprobs, entropy, grad[0].sum(-1)):
        assert x[1:3].isnan().all() and x[[0, 3]].isfinite().all()


@pytest.mark.parametrize("compiled", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 3, 20_000, 49_999])
def test_confident_row(place, dtype, compiled):
    """One logit 40 above 50,000 others: H is about 1e-11 and must hold its digits; so must the target's gradient."""
    logits = torch.randn(1, 1, 50_000, generator=torch.Generator().manual_seed(0)).mul(0.1).to(dtype)
    logits[0, 0, place] = 40.0
    p = logits[0, 0].double().softmax(0)
    log_p = logits[0, 0].double().log_softmax(0)
    others = torch.arange(50_000) != place
    rest = p[others].sum()
    exact = -(p * log_p)[others].sum() - torch.log1p(-rest)
    logprobs, entropy, _, _ = forward(logits, torch.tensor([place]), compiled=compiled)
    torch.testing.assert_close(entropy[0].double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(logprobs[0].double(), torch.log1p(-rest), rtol=1e-5, atol=0)
    logits = logits.float()
    rest = logits[0, 0].double().softmax(0)[others].sum()
    grad = backward(logits, torch.tensor([place]), torch.ones(1), torch.zeros(1), compiled=compiled)
    torch.testing.assert_close(grad[0, 0, place].double(), rest, rtol=1e-5, atol=0)


@pytest.mark.parametrize("compiled", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_in_place_equals_out_of_place(softcap, dtype, compiled):
    logits, targets = problem(2, 5, 4999, dtype)
    targets[3] = IGNORE
    a, b = torch.randn(10), torch.randn(10)
    want = backward(logits, targets, a, b, 0.7, softcap, compiled=compiled)
    got = backward(logits, targets, a, b, 0.7, softcap, compiled=compiled, out=logits)
    assert got.data_ptr() == logits.data_ptr() and torch.equal(got, want)


@pytest.mark.parametrize("compiled", PATHS)
def test_upstream_gradients_of_zero(compiled):
    """Zeros without a look at the row; a row of NaN stays NaN."""
    logits, targets = problem(1, 2, 300)
    logits[0, 1, 5] = torch.nan
    grad = backward(logits, targets, torch.zeros(2), torch.zeros(2), compiled=compiled)
    assert (grad[0, 0] == 0).all() and grad[0, 1].isnan().all()


@pytest.mark.skipif(not HAS_COMPILER, reason="no compiler")
def test_any_number_of_threads_gives_the_same_bits():
    logits, targets = problem(1, 101, 5000)
    a, b = torch.randn(101), torch.randn(101)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            stats = forward(logits, targets, compiled=True)
            results.append((*stats, backward(logits, targets, a, b, compiled=True, stats=stats)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


@pytest.mark.skipif(not HAS_COMPILER, reason="no compiler")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore")
def test_works_in_a_forked_child():
    """The parent's threads are not there; the child must not wait for them."""
    logits, targets = problem(1, 64, 5000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        want = forward(logits, targets, compiled=True)[0].sum().item()
        pid = os.fork()
        if pid == 0:
            row_stats.torch.get_num_threads = lambda: 2
            out = forward(logits, targets, compiled=True)
            os._exit(0 if abs(out[0].numpy().sum() - want) < 1 else 1)
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not HAS_COMPILER, reason="no compiler")
def test_rows_past_two_to_the_31_elements():
    """Offsets are 64-bit. The pages in between are never touched, so they cost no memory."""
    whole = torch.empty_strided((2, 1, 100), (2**31 + 7, 100, 1), dtype=torch.bfloat16).fill_(0)
    whole.copy_(problem(2, 1, 100, torch.bfloat16)[0])
    check(whole, torch.tensor([3, 4]), compiled=True)


class PeakMemory(TorchDispatchMode):
    """Bytes in storages made while it is active, at their highest."""

    def __init__(self):
        super().__init__()
        self.users, self.live, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)} - self.users.keys()
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage().data_ptr()) not in given:
                nbytes = tensor.untyped_storage().nbytes()
                if key not in self.users:
                    self.live += nbytes
                self.users[key] = self.users.get(key, 0) + 1
                weakref.finalize(tensor, self.release, key, nbytes)
        self.peak = max(self.peak, self.live)
        return result

    def release(self, key, nbytes):
        self.users[key] -= 1
        if self.users[key] == 0:
            del self.users[key]
            self.live -= nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_plain_path_holds_a_tenth_of_the_logits_at_most(softcap, dtype):
    logits, targets = problem(2, 250, 2000, dtype)
    vectors = [torch.randn(500) for _ in range(2)]
    with PeakMemory() as memory:
        stats = forward(logits, targets, 0.7, softcap, compiled=False)
    assert 0 < memory.peak < 0.1 * logits.nbytes
    with PeakMemory() as memory:
        backward(logits, targets, *vectors, 0.7, softcap, compiled=False, out=logits, stats=stats)
    assert 0 < memory.peak < 0.1 * logits.nbytes


@pytest.mark.skipif(not HAS_COMPILER, reason="no compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions(dtype):
    check_conversions(dtype)


def check_conversions(dtype):
    """Every number of 16 bits is read right; gradients are rounded to nearest, ties to even, as torch does."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    targets = torch.zeros(len(numbers), dtype=torch.int64)
    read = numbers.float()
    read = torch.where(read <= FLOOR, -torch.inf, read)  # masked words; their bits but the sign are read above 0
    assert torch.equal(forward(numbers[:, None, None], targets, compiled=True)[2], read)
    # Two equal logits: p = 1/2, and with b = 0 the gradient is a/2 at the target and -a/2 beside it. Halfway between
    # neighbours, just off it, subnormal, past the largest.
    whole = numbers.float()[numbers.abs() < 1e4]
    halfway = (whole.sort().values[1:] + whole.sort().values[:-1]) / 2
    special = torch.tensor([65_500.0, 65_519.9, 65_520.0, 7e4, torch.inf])
    wanted = torch.cat([whole, halfway, halfway * (1 + 2**-20), halfway * (1 - 2**-20), torch.randn(4000), special])
    wanted = wanted[(wanted.abs() > 2.0**-120) | (wanted == 0)]
    a, zeros = wanted * 2, torch.zeros(len(wanted))
    logits = torch.zeros(len(a), 1, 2, dtype=dtype)
    got = backward(logits, torch.zeros(len(a), dtype=torch.int64), a, zeros, compiled=True)[:, 0]
    assert torch.equal(got[:, 0], wanted.to(dtype)) and torch.equal(got[:, 1], (-wanted).to(dtype))


@pytest.mark.parametrize("compiled", PATHS)
@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_softcap_is_accurate_near_zero_and_when_saturated(softcap, compiled):
    """With one word, row_max is the capped logit itself: within four ulp of float64."""
    z = (
        torch.cat([torch.linspace(-5, 5, 4001), torch.linspace(-0.1, 0.1, 4001), torch.logspace(-30, 30, 500)])
        * softcap
    )
    targets = torch.zeros(len(z), dtype=torch.int64)
    row_max = forward(z[:, None, None], targets, 1.0, softcap, compiled=compiled)[2]
    torch.testing.assert_close(row_max.double(), reference.capped(z.double(), softcap), rtol=2.0**-21, atol=0)
