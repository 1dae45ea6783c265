"""entropy_scores, group_advantages, fused_entropy_score: worked by hand, and against the reference in float64."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gem_kernels
from gem_kernels import entropy_scores, group_advantages, num_fork_tokens, reference
from tests.kernels.helpers import BACKENDS, assert_near, backward, make, upstream

pytestmark = pytest.mark.usefixtures("poisoned_empty")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
INF, NAN = math.inf, math.nan


def close(got, want, relative=4e-6):
    assert_near(got.double(), want.double(), relative)


def score_one(values, *, mask=None, backend, device, **arguments):
    """One sequence padded -> (score, final, fork, valid) as Python numbers."""
    entropy = torch.tensor([values], dtype=torch.float32, device=device)
    mask = torch.ones_like(entropy, dtype=torch.bool) if mask is None else torch.tensor([mask], device=device).bool()
    arguments["answer_start"] = torch.tensor([arguments.pop("answer_start")], device=device)
    out = entropy_scores(entropy, completion_mask=mask, backend=backend, **arguments)
    return out.score.item(), out.final_entropy.item(), out.fork_entropy.item(), out.valid.item()


TEN = [5.0, 1.0, 3.0, 2.0, 4.0, 0.5, 1.5, 2.5, 1.0, 3.0]
H = 9.0  # never counted in what follows

# values, arguments, (score, final, fork, valid)
BY_HAND = {
    # answer 1, 3 -> 2;  reasoning 5 1 3 2 4 .5 1.5 2.5, m = floor(.25 * 8) = 2: 5, 4 -> 4.5;  S = -2 + 4.5
    "share": (TEN, {"answer_start": 8, "top_m": 0.25}, (2.5, 2.0, 4.5, True)),
    # m = max(1, floor(.1 * 8)) = 1 -> 5;  S = -2 + 2 * 5
    "weight": (TEN, {"answer_start": 8, "fork_weight": 2.0}, (8.0, 2.0, 5.0, True)),
    "negative weight": (TEN, {"answer_start": 8, "fork_weight": -1.0}, (-7.0, 2.0, 5.0, True)),
    # m = 3: 5, 4, 3 -> 4
    "count": (TEN, {"answer_start": 8, "top_m": 3}, (2.0, 2.0, 4.0, True)),
    # more than there are: all 8, sum 19.5 -> 2.4375
    "count past n": (TEN, {"answer_start": 8, "top_m": 2**40}, (0.4375, 2.0, 2.4375, True)),
    "all of them": (TEN, {"answer_start": 8, "top_m": 1.0}, (0.4375, 2.0, 2.4375, True)),
    "a count of one": (TEN, {"answer_start": 8, "top_m": 1}, (3.0, 2.0, 5.0, True)),
    # 3, 2, 2, 2, 1 with m = 3: two of the three 2s count: (3 + 2 + 2) / 3
    "ties": ([2.0, 3.0, 2.0, 1.0, 2.0, 0.5], {"answer_start": 5, "top_m": 3}, (7 / 3 - 0.5, 0.5, 7 / 3, True)),
    "all equal": ([0.1] * 9 + [0.0], {"answer_start": 9, "top_m": 4}, (0.1, 0.0, 0.1, True)),
    # the answer is everything: no reasoning, fork 0
    "answer at 0": ([1.0, 2.0, 3.0], {"answer_start": 0}, (-2.0, 2.0, 0.0, True)),
    "one token": ([1.5], {"answer_start": 0}, (-1.5, 1.5, 0.0, True)),
    # no answer in 10 tokens: the tail is tokens 8, 9
    "no answer, tail": (TEN, {"answer_start": 10, "top_m": 0.25}, (2.5, 2.0, 4.5, True)),
    "negative start, tail": (TEN, {"answer_start": -1, "top_m": 0.25}, (2.5, 2.0, 4.5, True)),
    # 4 * 3 // 5 = 2: the tail of three tokens is the last
    "short tail": ([1.0, 2.0, 3.0], {"answer_start": 7}, (-1.0, 3.0, 2.0, True)),
    # 4 * 1 // 5 = 0
    "tail of one": ([1.5], {"answer_start": 1}, (-1.5, 1.5, 0.0, True)),
    "no answer, exclude": (TEN, {"answer_start": 10, "no_answer": "exclude"}, (0.0, 0.0, 0.0, False)),
    "last token is an answer": (TEN, {"answer_start": 9, "no_answer": "exclude"}, (2.0, 3.0, 5.0, True)),
    # padding on both sides; answer_start counts from the first True
    "prompt and padding": (
        [H, H, 1.0, 3.0, 2.0, 4.0, H],
        {"mask": [0, 0, 1, 1, 1, 1, 0], "answer_start": 2},
        (0.0, 3.0, 3.0, True),
    ),
    # a hole in each span: positions still count, tokens do not. length 6, answer from position 4: (_, 2)
    "holes": (
        [1.0, H, 4.0, 3.0, H, 2.0],
        {"mask": [1, 0, 1, 1, 0, 1], "answer_start": 4, "top_m": 2},
        (1.5, 2.0, 3.5, True),
    ),
    # m = floor(.5 * 3) = 1, of the three counted, not floor(.5 * 5)
    "share of the counted": (
        [1.0, H, H, 4.0, 3.0, 2.0],
        {"mask": [1, 0, 0, 1, 1, 1], "answer_start": 5, "top_m": 0.5},
        (2.0, 2.0, 4.0, True),
    ),
    "nothing counted in reasoning": ([1.0, H, 2.0], {"mask": [0, 0, 1], "answer_start": 0}, (-2.0, 2.0, 0.0, True)),
    # length 10 from the extent, holes included: the tail is positions 8, 9 and only 9 counts
    "tail over a hole": (
        [1.0] + [H] * 8 + [2.0],
        {"mask": [1] + [0] * 8 + [1], "answer_start": -1},
        (-1.0, 2.0, 1.0, True),
    ),
    "empty": ([H, H], {"mask": [0, 0], "answer_start": 0}, (0.0, 0.0, 0.0, False)),
    "negative entropies": ([-1.0, -3.0, -2.0, -4.0], {"answer_start": 3, "top_m": 2}, (2.5, -4.0, -1.5, True)),
    # 3, 0, -0
    "both signs": ([-1.0, 3.0, -2.0, 0.0, -0.0, 1.0], {"answer_start": 5, "top_m": 3}, (0.0, 1.0, 1.0, True)),
}


@each_backend
@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case, backend, device):
    values, arguments, want = BY_HAND[case]
    got = score_one(values, backend=backend, device=device, **arguments)
    assert got == pytest.approx(want, rel=1e-6, abs=1e-6)


@each_backend
@pytest.mark.parametrize(
    "n,share,m", [(100, 0.29, 29), (10, 0.1, 1), (19, 0.1, 1), (50, 0.58, 29), (3, 1 / 3, 1), (9, 1e-9, 1)]
)
def test_a_share_is_the_decimal_it_is_written_as(n, share, m, backend, device):
    """0.29 * 100 is 28.999999999999996 in binary; the mean of the top 29 of 1..100 is 86."""
    values = [float(v) for v in range(1, n + 1)]
    _, _, fork, _ = score_one([*values, 0.0], answer_start=n, top_m=share, backend=backend, device=device)
    assert fork == pytest.approx(n - (m - 1) / 2, rel=1e-6)
    assert reference.top_count(share, n) == m


FRACTIONS = sorted(
    {Fraction(p, q) for q in range(1, 13) for p in range(1, q + 1)} | {Fraction(k, 100) for k in range(1, 100)}
)


@each_backend
def test_one_rule_for_m_over_many_fractions(backend, device):
    """Kernels, reference and num_fork_tokens; one entropy of 1 among zeros has a fork entropy of 1 / m."""
    lengths = [1, 6, 9] if backend == "triton" else range(1, 31)
    n = torch.tensor(lengths, device=device)
    entropy = torch.zeros(len(n), 31, device=device)
    entropy[:, 0] = 1.0
    mask = torch.arange(31, device=device) <= n[:, None]
    few = {"auto": FRACTIONS, "torch": FRACTIONS[::9], "triton": [Fraction(1, 3)]}[backend]
    for share in few:
        want = [max(1, share.numerator * i // share.denominator) for i in lengths]
        top_m = share.numerator / share.denominator
        assert num_fork_tokens(n, top_m).tolist() == want
        assert [reference.top_count(top_m, i) for i in lengths] == want
        out = entropy_scores(entropy, completion_mask=mask, answer_start=n, top_m=top_m, backend=backend)
        assert (1 / out.fork_entropy).round().tolist() == want, share


def test_num_fork_tokens_of_a_count_and_of_nothing():
    n = torch.tensor([[0, 1], [3, 9]], dtype=torch.int32)
    assert num_fork_tokens(n, 4).tolist() == [[0, 1], [3, 4]] and num_fork_tokens(n, 0.5).tolist() == [[0, 1], [1, 4]]
    assert num_fork_tokens(torch.tensor(2**31), 0.999999999).item() == 2**31 - 3
    assert num_fork_tokens(n, 2**63 - 1).dtype == torch.int64


@each_backend
def test_valid_from_the_caller(backend, device):
    """Truncated completions are left out, whatever they hold."""
    entropy = torch.tensor([[1.0, 2.0], [NAN, NAN], [3.0, 1.0]], device=device)
    mask = torch.ones(3, 2, dtype=torch.bool, device=device)
    valid = torch.tensor([True, False, True], device=device)
    start = torch.ones(3, dtype=torch.int64, device=device)
    out = entropy_scores(entropy, completion_mask=mask, answer_start=start, valid=valid, backend=backend)
    assert out.score.tolist() == [-1.0, 0.0, 2.0] and out.valid.tolist() == [True, False, True]
    assert out.final_entropy[1] == 0 and out.fork_entropy[1] == 0


@each_backend
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("place", [0, 5, 9])
def test_nan_stays_in_its_sequence(place, sign, backend, device):
    """NaN, of either sign (0 * inf on x86 has the sign bit set), in the reasoning or in the answer."""
    entropy = torch.tensor([TEN, TEN, TEN], device=device)
    entropy[1, place] = torch.copysign(torch.tensor(NAN), torch.tensor(sign))
    mask = torch.ones(3, 10, dtype=torch.bool, device=device)
    start = torch.tensor([8, 8, 8], device=device)
    out = entropy_scores(entropy, completion_mask=mask, answer_start=start, top_m=2, backend=backend)
    assert out.score[[0, 2]].tolist() == [2.5, 2.5] and out.score[1].isnan() and out.valid.all()
    mask[1, place] = False  # not counted, not read
    out = entropy_scores(entropy, completion_mask=mask, answer_start=start, top_m=2, backend=backend)
    assert out.score.isfinite().all()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_float_dtype_in_float32_out(dtype, backend, device):
    entropy = torch.tensor([TEN], dtype=dtype, device=device, requires_grad=True)
    mask = torch.ones(1, 10, dtype=torch.bool, device=device)
    out = entropy_scores(entropy, completion_mask=mask, answer_start=torch.tensor([8], device=device), backend=backend)
    assert out.score.dtype == out.final_entropy.dtype == out.fork_entropy.dtype == torch.float32
    assert out.score.item() == 3.0 and not out.score.requires_grad


@each_backend
def test_no_sequences_and_no_tokens(backend, device):
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    out = entropy_scores(
        torch.zeros(0, 5, device=device),
        completion_mask=torch.zeros(0, 5, dtype=torch.bool, device=device),
        answer_start=nothing,
        backend=backend,
    )
    assert out.score.shape == out.valid.shape == (0,)
    two = torch.zeros(2, dtype=torch.int64, device=device)
    offsets = torch.zeros(3, dtype=torch.int32, device=device)
    empty = entropy_scores(torch.zeros(0, device=device), cu_seqlens=offsets, answer_start=two, backend=backend)
    assert not empty.valid.any() and (empty.score == 0).all()
    mask = torch.zeros(2, 0, dtype=torch.bool, device=device)
    empty = entropy_scores(torch.zeros(2, 0, device=device), completion_mask=mask, answer_start=two, backend=backend)
    assert not empty.valid.any() and (empty.score == 0).all()
    assert group_advantages(torch.zeros(0, device=device), 4, backend=backend).shape == (0,)


@each_backend
def test_strided_inputs(backend, device):
    """Transposed entropy and mask, every second answer_start and valid."""
    torch.manual_seed(0)
    entropy, mask = torch.rand(12, 3, device=device).t(), (torch.rand(12, 3, device=device) < 0.8).t()
    start = torch.tensor([4, 0, 7, 0, 11, 0], device=device)[::2]
    valid = torch.tensor([True, False, False, False, True, False], device=device)[::2]
    arguments = {"answer_start": start, "valid": valid, "top_m": 3}
    got = entropy_scores(entropy, completion_mask=mask, **arguments, backend=backend)
    want = reference.entropy_scores(entropy.double(), completion_mask=mask, **arguments)
    close(got.score, want.score)
    assert torch.equal(got.valid, want.valid)


@each_backend
def test_a_sequence_of_131072_tokens(backend, device):
    """The longest promised, beside a short one; many ties."""
    T = 131_072
    entropy = torch.rand(2, T, generator=torch.Generator().manual_seed(0)).mul(4096).floor().div(1024).to(device)
    mask = torch.ones(2, T, dtype=torch.bool, device=device)
    mask[1, 100:] = False
    start = torch.tensor([T - 3000, 90], device=device)
    got = entropy_scores(entropy, completion_mask=mask, answer_start=start, backend=backend)
    want = reference.entropy_scores(entropy.double(), completion_mask=mask, answer_start=start)
    for name in ("score", "final_entropy", "fork_entropy"):
        close(getattr(got, name), getattr(want, name), relative=6e-6)


@st.composite
def sequences(draw):
    B, T = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    entropy = torch.randn(B, T, generator=generator) if draw(st.booleans()) else torch.rand(B, T, generator=generator)
    if draw(st.booleans()):
        entropy = entropy.mul(4).round().div(4)  # ties
    mask = torch.rand(B, T, generator=generator) < draw(st.sampled_from([0.3, 0.9, 2.0]))
    start = torch.randint(-2, T + 2, (B,), generator=generator)
    valid = torch.rand(B, generator=generator) < 0.8 if draw(st.booleans()) else None
    top_m = draw(st.one_of(st.integers(1, 50), st.sampled_from([0.01, 0.1, 0.2, 0.29, 0.5, 0.7, 1.0])))
    return entropy, mask, {
        "answer_start": start, "valid": valid, "top_m": top_m, "no_answer": draw(st.sampled_from(["tail", "exclude"])),
        "fork_weight": draw(st.sampled_from([0.0, 1.0, -0.5, 3.0])),
    }  # fmt: skip


@given(problem=sequences())
@settings(max_examples=20, deadline=None, derandomize=True)
@each_backend
def test_any_sequences(backend, problem):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    entropy, mask, arguments = problem
    want = reference.entropy_scores(entropy.double(), completion_mask=mask, **arguments)
    on = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    got = entropy_scores(entropy.to(device), completion_mask=mask.to(device), **on, backend=backend)
    for name in ("score", "final_entropy", "fork_entropy"):
        close(getattr(got, name), getattr(want, name))
    assert torch.equal(got.valid.cpu(), want.valid)


@given(problem=sequences(), lengths=st.lists(st.integers(0, 40), min_size=4, max_size=4))
@settings(max_examples=12, deadline=None, derandomize=True)
@each_backend
def test_packed_equals_padded(backend, problem, lengths):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    entropy, mask, arguments = problem
    B, T = entropy.shape
    lengths = torch.tensor([min(n, T) for n in lengths[:B]])
    mask = torch.arange(T)[None] < lengths[:, None]
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    on = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    padded = entropy_scores(entropy.to(device), completion_mask=mask.to(device), **on, backend=backend)
    packed = entropy_scores(entropy[mask].to(device), cu_seqlens=offsets, **on, backend=backend)
    close(packed.score, padded.score)
    assert torch.equal(packed.valid, padded.valid)


# Group advantages.


def advantages(scores, group_size, backend, device, valid=None, **arguments):
    valid = None if valid is None else torch.tensor(valid, device=device).bool()
    scores = torch.tensor(scores, device=device)
    return group_advantages(scores, group_size, valid=valid, backend=backend, **arguments).tolist()


# scores, group_size, arguments, advantages
ADVANTAGES_BY_HAND = {
    "two groups": ([1.0, 3.0, 10.0, 20.0], 2, {}, [-1.0, 1.0, -5.0, 5.0]),
    "one invalid": ([1.0, 3.0, 100.0], 3, {"valid": [1, 1, 0]}, [-1.0, 1.0, 0.0]),
    "an invalid NaN": ([1.0, 3.0, NAN], 3, {"valid": [1, 1, 0]}, [-1.0, 1.0, 0.0]),
    # softmax of log 1, log 3: 1/4, 3/4
    "softmax": ([0.0, math.log(3.0)], 2, {"mapping": "softmax"}, [-0.25, 0.25]),
    # strengths 0, 1/2, 1, mean 1/2
    "rank": ([-7.0, 0.1, 50.0], 3, {"mapping": "rank"}, [-0.5, 0.0, 0.5]),
    # two tied at the top of four: 0, 1/3, (2 + .5)/3 twice; mean 1/2
    "rank with a tie": ([1.0, 2.0, 5.0, 5.0], 4, {"mapping": "rank"}, [-1 / 2, -1 / 6, 1 / 3, 1 / 3]),
    # the invalid one is neither beaten nor beats: strengths 0, 1
    "rank, one invalid": ([1.0, 9.0, 5.0], 3, {"mapping": "rank", "valid": [1, 0, 1]}, [-0.5, 0.0, 0.5]),
    # 1, 3: deviation sqrt(2) with correction 1
    "scaled": ([1.0, 3.0], 2, {"scale": "group", "eps": 0.0}, [-(0.5**0.5), 0.5**0.5]),
    "scaled with eps": ([1.0, 3.0], 2, {"scale": "group", "eps": 1.0}, [-1 / (1 + 2**0.5), 1 / (1 + 2**0.5)]),
    "one valid": ([1.0, 3.0, 2.0], 3, {"valid": [0, 1, 0]}, [0.0, 0.0, 0.0]),
    "none valid": ([1.0, 3.0, 2.0], 3, {"valid": [0, 0, 0], "scale": "group"}, [0.0, 0.0, 0.0]),
    "groups of one": ([1.0, -3.0], 1, {}, [0.0, 0.0]),
    "groups of one, scaled": ([1.0, -3.0], 1, {"scale": "group", "mapping": "rank"}, [0.0, 0.0]),
}  # fmt: skip


@each_backend
@pytest.mark.parametrize("case", ADVANTAGES_BY_HAND)
def test_advantages_by_hand(case, backend, device):
    scores, group_size, arguments, want = ADVANTAGES_BY_HAND[case]
    got = advantages(scores, group_size, backend, device, **arguments)
    assert got == pytest.approx(want, rel=1e-6, abs=1e-7)
    assert [a == 0 for a in got] == [a == 0 for a in want]


@each_backend
@pytest.mark.parametrize("mapping", ["identity", "softmax", "rank"])
@pytest.mark.parametrize("scale", ["none", "group"])
@pytest.mark.parametrize("n", [2, 3, 7, 11])
def test_equal_scores_give_exact_zeros(n, scale, mapping, backend, device):
    """The mean of seven 0.1s is not 0.1 in fp32, and a deviation of 1e-9 over eps is a gradient out of nothing."""
    for value in (0.1, -3.3, 1e30):
        got = advantages([value] * n, n, backend, device, mapping=mapping, scale=scale)
        assert got == [0.0] * n
    got = advantages([0.1] * n + [NAN], n + 1, backend, device, mapping=mapping, scale=scale, valid=[1] * n + [0])
    assert got == [0.0] * (n + 1)


@each_backend
def test_nan_stays_in_its_group(backend, device):
    for mapping in ("identity", "softmax"):
        got = advantages([1.0, NAN, 1.0, 2.0], 2, backend, device, mapping=mapping)
        assert all(map(math.isnan, got[:2])) and all(map(math.isfinite, got[2:]))


@given(
    groups=st.integers(1, 3),
    G=st.integers(1, 17),
    mapping=st.sampled_from(["identity", "softmax", "rank"]),
    scale=st.sampled_from(["none", "group"]),
    ties=st.booleans(),
    masked=st.booleans(),
    shift=st.sampled_from([0.0, 100.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, derandomize=True)
@each_backend
def test_any_groups(backend, groups, G, mapping, scale, ties, masked, shift, seed):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(groups * G, generator=generator) + shift
    scores = scores.round() if ties else scores
    valid = torch.rand(groups * G, generator=generator) < 0.6 if masked else None
    want = reference.group_advantages(scores.double(), G, valid=valid, mapping=mapping, scale=scale)
    got = group_advantages(
        scores.to(device),
        G,
        valid=None if valid is None else valid.to(device),
        mapping=mapping,
        scale=scale,
        backend=backend,
    )
    # fp32 scores of size 100 lose 1e-5 of differences of size 1, and eps = 1e-4 magnifies a deviation near 0.
    close(got, want, 4e-5)
    assert (got.view(groups, G).sum(1).abs() <= 1e-6 * (1 + got.abs().max()) * G).all()
    if valid is not None:
        assert (got.cpu()[~valid] == 0).all()


# The three in one.


def batch(dtype=torch.float32, device="cpu", B=4, T=9, V=60):
    logits, targets = make(B, T, V, dtype=dtype, device=device)
    mask = torch.arange(T, device=device)[None] < torch.tensor([T, 5, 7, 1], device=device)[:, None]
    mask[0, :2] = mask[0, 4] = False
    logits[~mask] = torch.nan  # never read
    return logits, targets, mask, torch.tensor([3, 2, 9, 0], device=device)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_is_its_parts(dtype, backend, device):
    logits, targets, mask, start = batch(dtype, device)
    span = {"answer_start": start, "top_m": 0.3, "fork_weight": 0.5, "no_answer": "exclude"}
    group = {"mapping": "rank", "scale": "group", "eps": 1e-3}
    out = gem_kernels.fused_entropy_score(
        logits,
        targets,
        completion_mask=mask,
        group_size=2,
        temperature=0.8,
        softcap=20.0,
        **span,
        **group,
        backend=backend,
    )
    inner = targets.masked_fill(~mask, -100)
    stats = gem_kernels.token_stats(logits, inner, temperature=0.8, softcap=20.0, backend=backend)
    scores = entropy_scores(stats.entropy, completion_mask=mask, **span, backend=backend)
    want = group_advantages(scores.score, 2, valid=scores.valid, **group, backend=backend)
    assert torch.equal(out.logprobs, stats.logprobs) and torch.equal(out.entropy, stats.entropy)
    for name in ("score", "final_entropy", "fork_entropy", "valid"):
        assert torch.equal(getattr(out, name), getattr(scores, name))
    assert torch.equal(out.advantages, want) and out.valid.tolist() == [True, True, False, True]
    assert (out.logprobs[~mask] == 0).all() and (out.entropy[~mask] == 0).all()


@each_backend
@pytest.mark.parametrize("use", ["logprobs", "entropy", "both"])
def test_gradients_of_fused(use, backend, device):
    """Through log-probs and entropies as in token_stats; scores and advantages are constants."""
    logits, targets, mask, start = batch(device=device)
    a, b = upstream(targets.shape, use, device=device)
    got, want = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    out = gem_kernels.fused_entropy_score(
        got, targets, completion_mask=mask, answer_start=start, group_size=2, backend=backend
    )
    backward(out, a, b)
    backward(gem_kernels.token_stats(want, targets.masked_fill(~mask, -100), backend=backend), a, b)
    assert torch.equal(got.grad, want.grad) and got.grad.isfinite().all() and (got.grad[~mask] == 0).all()
    for name in ("score", "final_entropy", "fork_entropy", "advantages"):
        assert not getattr(out, name).requires_grad


@each_backend
def test_fused_packed_equals_padded(backend, device):
    logits, targets, mask, start = batch(device=device)
    mask[0] = True
    logits = logits.nan_to_num(0.3)
    offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    arguments = {"answer_start": start, "group_size": 4, "backend": backend}
    padded = gem_kernels.fused_entropy_score(logits, targets, completion_mask=mask, **arguments)
    packed = gem_kernels.fused_entropy_score(logits[mask], targets[mask], cu_seqlens=offsets, **arguments)
    assert torch.equal(packed.logprobs, padded.logprobs[mask]) and torch.equal(packed.entropy, padded.entropy[mask])
    close(packed.advantages, padded.advantages)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mapping", ["identity", "softmax", "rank"])
def test_equal_scores_give_zeros_without_eps(mapping, backend, device):
    scores = torch.tensor([0.3, 0.3, 0.3, 1.0, 2.0, 4.0], device=device)
    got = group_advantages(scores, 3, mapping=mapping, scale="group", eps=0.0, backend=backend)
    want = reference.group_advantages(scores.double(), 3, mapping=mapping, scale="group", eps=0.0)
    assert (got[:3] == 0).all() and (want[:3] == 0).all()
    close(got, want, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["none", "group"])
@pytest.mark.parametrize("mapping", ["identity", "softmax", "rank"])
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_an_invalid_member_is_zero_beside_any_score(special, mapping, scale, backend, device):
    scores = torch.tensor([special, 1.0, 2.0, 0.5], device=device)
    valid = torch.tensor([True, True, False, True], device=device)
    got = group_advantages(scores, 4, valid=valid, mapping=mapping, scale=scale, backend=backend)
    assert got[2] == 0
