"""The optional statistics of token_stats and linear_token_stats, on every backend, against the reference in float64.

Budget: twice what eager torch errs in float32 on the same numbers, plus rounding, as for the other statistics.
"""

from __future__ import annotations

import math

import pytest
import torch

import gem_kernels as gk
from gem_kernels import reference
from gem_kernels.backends.types import RowOptions
from gem_kernels.types import EXTRA_STATS
from tests.kernels.helpers import (
    BACKENDS,
    DTYPES,
    IGNORE,
    LINEAR_BACKENDS,
    assert_near,
    assert_within_budget,
    empty_stats,
    make,
    needs_backend,
    problem,
    room,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty", "one_thread")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def exact_and_torchs(logits, targets, **options):
    """The reference in float64, and in float32."""
    found = []
    for dtype in (torch.float64, torch.float32):
        more = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        found.append(reference.token_stats(logits.to(dtype), targets, extra=EXTRA_STATS, **more))
    return found


def check_extra(stats, logits, targets, **options) -> None:
    exact, torchs = exact_and_torchs(logits, targets, **options)
    tau = torch.as_tensor(options.get("temperature", 1.0)).double().to(logits.device)
    slack = 5 * 2.0**-23 * options["softcap"] / float(tau.min()) if options.get("softcap") else 0.0
    for name in EXTRA_STATS:
        got, want = getattr(stats, name), getattr(exact, name)
        assert got.shape == targets.shape and not got.requires_grad, name
        if name == "is_top1":
            # A softcap in float32 may make two logits one, of which the first is on top.
            decided = exact.margin > slack + 1e-9
            assert got.dtype == torch.bool and torch.equal(got[decided | ~want], want[decided | ~want]), name
            continue
        assert got.dtype == torch.float32, name
        # An error of d is one of log p: of its variance, times twice the deviation.
        nats = slack * (1 + 2 * float(exact.varentropy.nan_to_num().max().sqrt())) if name == "varentropy" else slack
        assert_within_budget(got, want, getattr(torchs, name), name, nats=2 * nats)


# V: one, two, fewer than a vector, below and past a block, several blocks and an odd rest.
@each_backend
@each_dtype
@pytest.mark.parametrize("V", [1, 2, 7, 1000, 8193])
def test_matches_float64(V, dtype, backend, device):
    logits, targets = make(5, V, dtype=dtype, device=device)
    logits[3], targets[3] = torch.nan, IGNORE
    targets[0], targets[1] = logits[0].argmax(), V - 1
    stats = gk.token_stats(logits, targets, extra=EXTRA_STATS, backend=backend)
    check_extra(stats, logits, targets)
    assert stats.is_top1[0] and (V < 3 or not stats.is_top1[4])
    assert all(getattr(stats, name)[3] == 0 for name in EXTRA_STATS)


@each_backend
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("temperature", [0.6, "rows"])
def test_they_see_softcap_and_temperature(temperature, softcap, backend, device):
    logits, targets = make(2, 3, 601, scale=9.0, device=device)
    tau = torch.tensor([[0.3], [2.0]], device=device) if temperature == "rows" else temperature
    options = {"temperature": tau, "softcap": softcap}
    stats = gk.token_stats(logits[:, :, 1:], targets % 600, extra=EXTRA_STATS, backend=backend, **options)
    check_extra(stats, logits[:, :, 1:], targets % 600, **options)


@each_backend
def test_confident_and_flat_rows_keep_their_digits(backend, device):
    """One logit 40 above 5,000 others; one 3 above, whose varentropy is the small difference of large squares; all
    equal; and a large number added to a row."""
    V = 5001
    logits = torch.zeros(4, V, device=device)
    logits[0, 3000], logits[1, 5] = 40.0, 3.0
    logits[3] = torch.randn(V, generator=torch.Generator().manual_seed(0)).to(device) * 2 + 1024.0
    targets = torch.tensor([3000, 7, 0, 9], device=device)
    stats = gk.token_stats(logits, targets, extra=EXTRA_STATS, backend=backend)
    exact, _ = exact_and_torchs(logits, targets)
    q = 5000 * math.exp(-40.0)  # s - 1, which float64 rounds after the 1
    p = q / (1 + q)
    exact.varentropy[0], exact.top_logprob[0] = 1600 * p * (1 - p), -math.log1p(q)
    exact.log_sum_sq_probs[0] = math.log1p(q * math.exp(-40)) - 2 * math.log1p(q)
    for name in EXTRA_STATS:
        got, want = getattr(stats, name), getattr(exact, name)
        relative = 1e-2 if backend == "triton" else 1e-5  # what shares a lane with the maximum is rounded away
        error = (got.double() - want.double()).abs()
        allowed = torch.tensor([relative, 3e-6, 0.0, 3e-6], device=device) * want.double().abs()
        # A flat row's probabilities are differences from log V.
        allowed[1:3] += 2e-6 if name in ("self_certainty", "log_sum_sq_probs", "top_logprob") else 0.0
        assert (error <= allowed + 1e-20).all(), (name, got, want)
    assert stats.varentropy[2] == 0 and stats.margin[2] == 0 and stats.is_top1.tolist() == [True, False, True, False]


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties_of_the_top_word(dtype, backend, monkeypatch, device):
    """The first of them is the top word, as torch.argmax has it; wherever the two lie. Their margin is 0."""
    if backend == "triton":
        from gem_kernels.backends.triton import row_stats

        align = 16 // dtype.itemsize
        monkeypatch.setattr(row_stats, "launch_options", lambda V, size: row_stats.Launch(256, 32 * align, align, 1))
    V = 771  # rows with an edge on each side, whole blocks of 256 and a tail
    places = [0, 5, 133, 261, 515, 770]
    pairs = [(i, j) for i in places for j in places if i < j]
    logits = torch.randn(len(pairs), V, generator=torch.Generator().manual_seed(1)).clamp(max=4.0)
    for row, (i, j) in zip(logits, pairs):
        row[i] = row[j] = 5.0
    logits = logits.to(device, dtype)
    for which, on_top in ((0, True), (1, False)):
        targets = torch.tensor([pair[which] for pair in pairs], device=device)
        stats = gk.token_stats(logits, targets, extra=("is_top1", "margin"), backend=backend)
        assert (stats.is_top1 == on_top).all() and (stats.margin == 0).all()
    logits[torch.arange(len(pairs)), [j for _, j in pairs]] = 4.5
    stats = gk.token_stats(logits, targets, extra=("is_top1", "margin"), backend=backend)
    assert not stats.is_top1.any() and (stats.margin == 0.5).all()


@each_backend
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("low", [-torch.inf, torch.finfo(torch.float32).min, -1.01e30])
def test_masked_words(low, softcap, backend, device):
    logits, targets = make(6, 1031, device=device)
    logits[0, 1000] = low  # alone
    logits[1, :600] = low  # whole blocks of it
    logits[2], logits[2, 7] = low, 1.0  # all but one
    logits[3] = low
    logits[4, 3], logits[5, 3] = torch.nan, torch.inf
    targets[:] = torch.tensor([1000, 700, 7, 3, 3, 3])
    stats = gk.token_stats(logits, targets, softcap=softcap, extra=EXTRA_STATS, backend=backend)
    assert (stats.self_certainty[:3] == torch.inf).all() and (stats.mean_logits[:3] == -torch.inf).all()
    assert stats.is_top1.tolist()[2:] == [True, False, False, False] and not stats.is_top1[0]
    assert stats.margin[2] == torch.inf
    assert stats.varentropy[2] == stats.log_sum_sq_probs[2] == stats.top_logprob[2] == 0
    masked = logits[:2].masked_fill(logits[:2] <= -1e30, -torch.inf)
    exact, torchs = exact_and_torchs(masked, targets[:2], softcap=softcap)
    for name in ("varentropy", "log_sum_sq_probs", "top_logprob", "margin"):
        want = getattr(exact, name)
        assert_within_budget(getattr(stats, name)[:2], want, getattr(torchs, name), name, nats=4e-4 if softcap else 0.0)
    for name in EXTRA_STATS:
        assert name == "is_top1" or getattr(stats, name)[3:].isnan().all(), name


@each_backend
def test_what_is_not_asked_for_is_none_and_the_rest_is_the_same_to_the_bit(backend, device):
    logits, targets = make(3, 3000, dtype=torch.bfloat16, device=device)
    plain = gk.token_stats(logits, targets, backend=backend)
    every = gk.token_stats(logits, targets, extra=EXTRA_STATS, backend=backend)
    assert torch.equal(plain.logprobs, every.logprobs) and torch.equal(plain.entropy, every.entropy)
    for name in EXTRA_STATS:
        one = gk.token_stats(logits, targets, extra=[name], backend=backend)
        assert [x for x in EXTRA_STATS if getattr(one, x) is not None] == [name]
        assert torch.equal(getattr(one, name), getattr(every, name)), name
        assert getattr(plain, name) is None


@each_backend
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_gradients_stay_what_they_are(inplace_backward, backend, device):
    logits, targets = make(4, 300, device=device)
    grads = []
    for extra in ((), ("varentropy", "is_top1")):
        leaf = logits.clone().requires_grad_()
        stats = gk.token_stats(leaf * 1.0, targets, extra=extra, inplace_backward=inplace_backward, backend=backend)
        (stats.logprobs.sum() + stats.entropy.sum()).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads) and not stats.varentropy.requires_grad

    def entropy_of(z):
        stats = gk.token_stats(z, targets, extra=("margin",), backend=backend)
        return stats.entropy.sum(), stats.margin

    _, margin = torch.func.grad(entropy_of, has_aux=True)(logits)
    assert torch.equal(margin, gk.token_stats(logits, targets, extra=("margin",), backend=backend).margin)


@pytest.mark.parametrize("splits,softcap", [(3, 4.0), (7, None)])
def test_split_rows_equal_whole_rows(softcap, splits, monkeypatch, device):
    """As in test_token_stats.py: blocks of 256, unevenly divided, some splits without any."""
    launch = pytest.importorskip("gem_kernels.backends.triton.launch")
    from gem_kernels.backends.triton import row_stats

    monkeypatch.setattr(row_stats, "launch_options", lambda V, size: row_stats.Launch(256, 128, 4, 1))
    logits, targets = make(7, 1029, device=device)
    logits[1, :600] = -torch.inf
    logits[2, 3] = 50.0
    logits[3] = torch.nan  # ignored
    logits[4, 900] = logits[4, 270] = logits[4, 271] = 14.0
    logits[5, 1028], logits[5, 0] = 15.0, 14.0
    targets[:] = torch.tensor([0, 1028, 3, IGNORE, 270, 1028, int(logits[6].argmax())])
    tau = torch.tensor([1.0, 0.5, 1.0, 1.0, 1.0, 2.0, 0.7], device=device)
    options = RowOptions(1.0, tau, softcap, IGNORE, "triton", EXTRA_STATS)
    whole, split = (torch.full((len(EXTRA_STATS), 7), torch.nan, device=device) for _ in range(2))
    launch.row_stats_forward(logits[None], targets, options, empty_stats(7, device), 1, whole)
    launch.row_stats_forward(logits[None], targets, options, empty_stats(7, device), splits, split)
    for name, got, want in zip(EXTRA_STATS, split, whole):
        assert_near(got[[0, 1, 3, 4, 5, 6]], want[[0, 1, 3, 4, 5, 6]], 1e-5, name)
        assert_near(got[2], want[2], 1 / 64, name)
        assert want[3] == 0
    top1 = split[EXTRA_STATS.index("is_top1")].tolist()
    if softcap is None:
        assert top1[2:] == [1, 0, 1, 1, 1] and split[EXTRA_STATS.index("margin"), 4] == 0
        stats = gk.TokenStats(split[0], split[0], **dict(zip(EXTRA_STATS, split)))
        stats = gk.TokenStats(**{**vars(stats), "is_top1": stats.is_top1 != 0})
        keep = [0, 1, 4, 5, 6]
        rows = gk.TokenStats(**{k: v[keep] for k, v in vars(stats).items()})
        check_extra(rows, logits[keep], targets[keep], temperature=tau[keep])


# Hidden states.


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
@pytest.mark.parametrize("rows", [3, 100], ids=["chunks", "one chunk"])
def test_linear(rows, backend, device):
    needs_backend(backend, device)
    p = problem(3, 7, device=device, softcap=20.0, logit_scale=1.5, temperature=torch.rand(3, 7) + 0.4)
    leaves = p.leaves()
    kept = torch.tensor([1, 2, 5, 8, 20])
    for given in (None, kept):
        options = {"rows": given, "workspace_bytes": room(257, rows), "backend": backend, **p.options}
        stats = gk.linear_token_stats(targets=p.targets, extra=EXTRA_STATS, **leaves, **options)
        logits, arguments = p.eager(torch.float64, **p.leaves(torch.float64))
        counted = p.targets.clone()
        if given is not None:
            counted = torch.full_like(counted, IGNORE).view(-1)
            counted[kept] = p.targets.view(-1)[kept]
            counted = counted.view(p.targets.shape)
        exact = reference.token_stats(logits, counted, extra=EXTRA_STATS, **arguments)
        for name in EXTRA_STATS:
            got, want = getattr(stats, name), getattr(exact, name)
            assert not got.requires_grad
            if name == "is_top1":
                assert torch.equal(got, want)
            else:
                assert_near(got.double(), want.detach(), 1e-5, name)
    plain = gk.linear_token_stats(targets=p.targets, active_vocab=2**-6, **leaves, **options)
    every = gk.linear_token_stats(targets=p.targets, active_vocab=2**-6, extra=EXTRA_STATS, **leaves, **options)
    assert torch.equal(plain.entropy, every.entropy) and torch.equal(every.margin, stats.margin)
    grads = [torch.autograd.grad((x.entropy + x.logprobs).sum(), list(leaves.values())) for x in (plain, every)]
    assert all(torch.equal(x, y) for x, y in zip(*grads))


def test_compiled_without_a_graph_break(device):
    logits, targets = make(2, 5, 40, device=device)
    weight, _ = make(40, 40, device=device)

    def call(logits, weight, targets, names):
        stats = gk.token_stats(logits, targets, extra=names)
        linear = gk.linear_token_stats(logits, weight, targets, extra=names)
        fields = [getattr(x, name) for x in (stats, linear) for name in names]
        return (stats.logprobs - linear.entropy).sum(), fields

    for names in (EXTRA_STATS, ("is_top1",), ()):
        torch._dynamo.reset()
        results = []
        for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            leaves = [x.clone().requires_grad_() for x in (logits, weight)]
            total, fields = function(*leaves, targets, names)
            total.backward()
            results.append((*fields, *(x.grad for x in leaves)))
        assert len(results[0]) == 2 * len(names) + 2
        for x, y in zip(*results):
            assert torch.equal(x, y) if x.dtype == torch.bool else assert_near(y, x) is None


def test_bad_names():
    logits, targets = make(2, 5)
    for function, given in ((gk.token_stats, (logits,)), (gk.linear_token_stats, (logits, torch.zeros(9, 5)))):
        for extra, message in (
            ("is_top1", r"`extra` must be a sequence of names, such as \('self_certainty',\), got 'is_top1'"),
            (None, "`extra` must be a sequence of names"),
            ([1], "`extra` must be a sequence of names"),
            (["varentopy"], "got 'varentopy'; did you mean 'varentropy'"),
            (("is_top1", "no such"), "names among 'self_certainty', .*'margin', got 'no such'$"),
        ):
            with pytest.raises(ValueError, match=message):
                function(*given, targets, extra=extra)
    stats = gk.token_stats(logits, targets, extra={"margin", "is_top1"})
    assert stats.margin is not None and stats.is_top1 is not None
