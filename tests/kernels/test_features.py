"""completion_features and LinearScore: worked by hand, against the reference in float64, and on bad input."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_kernels import (
    LinearScore,
    completion_features,
    entropy_scores,
    fused_entropy_score,
    fused_linear_entropy_score,
    fused_linear_sega_loss,
    reference,
    sega_loss,
)
from gem_kernels.types import FEATURES
from tests.kernels.helpers import BACKENDS, make

pytestmark = pytest.mark.usefixtures("poisoned_empty")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
INF, NAN = math.inf, math.nan
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def close(got, want, what):
    torch.testing.assert_close(got.double().cpu(), want.double().cpu(), rtol=3e-6, atol=3e-6, equal_nan=True, msg=what)


def features_of(entropy, logprobs, backend, mask=None, **arguments) -> dict[str, float]:
    """The features of one padded completion as Python numbers."""
    entropy = torch.tensor([entropy], device=DEVICE)
    mask = torch.ones_like(entropy, dtype=torch.bool) if mask is None else torch.tensor([mask], device=DEVICE).bool()
    start = torch.tensor([arguments.pop("answer_start")], device=DEVICE)
    x = completion_features(
        entropy, torch.tensor([logprobs], device=DEVICE), completion_mask=mask, answer_start=start, backend=backend,
        **arguments,
    )  # fmt: skip
    return {field.name: getattr(x, field.name).item() for field in dataclasses.fields(x)}


ENTROPY = [5.0, 1.0, 3.0, 2.0, 4.0]
LOGPROBS = [-1.0, -0.5, -4.0, -0.25, -0.25]


@each_backend
def test_by_hand(backend):
    """Reasoning 5 1 3, answer 2 4."""
    assert features_of(ENTROPY, LOGPROBS, backend, answer_start=3, top_m=2) == {
        "final_entropy": 3.0, "fork_entropy": 4.0, "reasoning_entropy": 3.0, "mean_entropy": 3.0, "max_entropy": 5.0,
        "mean_logprob": pytest.approx(-1.2), "sum_logprob": -6.0, "min_logprob": -4.0, "length": 5.0, "valid": True,
    }  # fmt: skip


@each_backend
def test_padding_and_holes_count_nowhere(backend):
    """What is masked is NaN: counted are 5 (reasoning), 2, 4."""
    entropy = [NAN, 5.0, NAN, 2.0, 4.0, NAN]
    logprobs = [NAN, -1.0, NAN, -0.25, -0.75, NAN]
    got = features_of(entropy, logprobs, backend, mask=[0, 1, 0, 1, 1, 0], answer_start=2, top_m=2)
    assert got == {
        "final_entropy": 3.0, "fork_entropy": 5.0, "reasoning_entropy": 5.0, "mean_entropy": pytest.approx(11 / 3),
        "max_entropy": 5.0, "mean_logprob": pytest.approx(-2 / 3), "sum_logprob": -2.0, "min_logprob": -1.0,
        "length": 3.0, "valid": True,
    }  # fmt: skip


@each_backend
def test_no_reasoning_and_no_answer(backend):
    got = features_of([2.0, 4.0], [-1.0, -2.0], backend, answer_start=0)
    assert (got["fork_entropy"], got["reasoning_entropy"], got["final_entropy"]) == (0.0, 0.0, 3.0)
    invalid = features_of([2.0, 4.0], [-1.0, -2.0], backend, answer_start=2, no_answer="exclude")
    assert invalid == {**dict.fromkeys(FEATURES, 0.0), "valid": False}
    assert features_of([9.0], [-9.0], backend, mask=[0], answer_start=0) == invalid


@each_backend
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_and_inf_reach_what_is_made_from_them(backend, sign):
    nan = math.copysign(NAN, sign)
    in_reasoning = features_of([5.0, nan, 3.0, 2.0], LOGPROBS[:4], backend, answer_start=3)
    assert in_reasoning["final_entropy"] == 2.0 and in_reasoning["sum_logprob"] == -5.75
    bad = [name for name in FEATURES if math.isnan(in_reasoning[name])]
    assert bad == ["fork_entropy", "reasoning_entropy", "mean_entropy", "max_entropy"]
    impossible = features_of(ENTROPY, [-1.0, -INF, -4.0, -0.25, -0.25], backend, answer_start=3)
    assert [impossible[name] for name in FEATURES[5:8]] == [-INF] * 3 and impossible["mean_entropy"] == 3.0
    unknown = features_of(ENTROPY, [-1.0, nan, -4.0, -0.25, -0.25], backend, answer_start=3)
    assert all(math.isnan(unknown[name]) for name in FEATURES[5:8]) and unknown["max_entropy"] == 5.0


@st.composite
def sequences(draw):
    B, T = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    entropy, logprobs = torch.rand(2, B, T, generator=generator).mul(4).unbind()
    lengths = torch.randint(0, T + 1, (B,), generator=generator)
    mask = torch.arange(T)[None] < lengths[:, None]
    start = torch.randint(-2, T + 2, (B,), generator=generator)
    valid = torch.rand(B, generator=generator) < 0.8 if draw(st.booleans()) else None
    top_m = draw(st.sampled_from([1, 3, 50, 0.01, 0.1, 0.29, 0.5, 1.0]))
    no_answer = draw(st.sampled_from(["tail", "exclude"]))
    return (entropy, -logprobs), mask, {"answer_start": start, "valid": valid, "top_m": top_m, "no_answer": no_answer}


@given(problem=sequences(), holes=st.booleans())
@settings(max_examples=15, deadline=None, derandomize=True)
@each_backend
def test_any_sequences_in_both_layouts(backend, problem, holes):
    tokens, mask, arguments = problem
    on = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(DEVICE, torch.int32)
    packed = completion_features(*(x[mask].to(DEVICE) for x in tokens), cu_seqlens=offsets, **on, backend=backend)
    want = reference.completion_features(*(x.double() for x in tokens), completion_mask=mask, **arguments)
    if holes:
        mask = mask & (torch.arange(mask.shape[1]) % 3 != 1)
    padded = completion_features(
        *(x.to(DEVICE) for x in tokens), completion_mask=mask.to(DEVICE), **on, backend=backend
    )
    with_holes = reference.completion_features(*(x.double() for x in tokens), completion_mask=mask, **arguments)
    for got, truth in ((packed, want), (padded, with_holes)):
        assert torch.equal(got.valid.cpu(), truth.valid)
        for name in FEATURES:
            close(getattr(got, name), getattr(truth, name), name)


@each_backend
def test_the_paper_s_score_is_a_linear_score(backend):
    torch.manual_seed(0)
    entropy, logprobs = torch.rand(2, 6, 30, device=DEVICE).unbind()
    layout = {
        "completion_mask": torch.ones(6, 30, dtype=torch.bool, device=DEVICE),
        "answer_start": torch.arange(20, 32, 2, device=DEVICE),
        "no_answer": "exclude",
        "backend": backend,
    }
    x = completion_features(entropy, logprobs, **layout)
    paper = entropy_scores(entropy, fork_weight=-0.3, **layout)
    close(x.score(LinearScore({"final_entropy": -1.0, "fork_entropy": -0.3})), paper.score, "score")
    assert x.score(LinearScore({"length": 2.0}, {"length": 4.0})).tolist() == [15.0] * 5 + [0.0]
    assert not paper.valid[5] and torch.equal(paper.valid, x.valid)


def test_a_feature_without_weight_is_left_out():
    impossible = torch.tensor([[-INF, -1.0]], device=DEVICE)
    x = completion_features(
        torch.ones(1, 2, device=DEVICE), impossible, answer_start=torch.tensor([1], device=DEVICE),
        completion_mask=torch.ones(1, 2, dtype=torch.bool, device=DEVICE),
    )  # fmt: skip
    assert x.score(LinearScore({"mean_entropy": -1.0, "mean_logprob": 0.0})).tolist() == [-1.0]
    assert x.score(LinearScore({"mean_logprob": 1.0})).tolist() == [-INF]


@pytest.mark.parametrize(
    "weights,scales,message",
    [
        ({"entropy": 1.0}, {}, r"`weights` must name features among final_entropy, .*, got 'entropy'"),
        ({"length": 1.0}, {"len": 1.0}, r"`scales` must name features among .*, got 'len'"),
        ({"length": NAN}, {}, r"`weights` must hold finite numbers, got length: nan"),
        ({"length": 10**400}, {}, r"`weights` must hold finite numbers, got length: 1000"),
        ({"length": True}, {}, r"`weights` must hold finite numbers, got length: True"),
        ({"length": "1"}, {}, r"`weights` must hold finite numbers, got length: '1'"),
        ({"length": 1.0}, {"length": 0.0}, r"`scales` must hold finite numbers above 0, got length: 0.0"),
        ({"length": 1.0}, {"length": 1e-200}, r"`weights` over `scales` must fit float32"),
        ({}, {}, r"`weights` must name a feature, got none"),
        ([1.0], {}, r"`weights` must be a mapping"),
    ],
)
def test_a_linear_score_that_is_none(weights, scales, message):
    with pytest.raises(ValueError, match=message):
        LinearScore(weights, scales)


LINEAR = LinearScore(
    {"final_entropy": -0.7, "fork_entropy": 0.2, "mean_logprob": 1.5, "min_logprob": 0.3, "length": -0.1},
    {"mean_logprob": 0.5, "length": 3.0},
)


def problem(B=4, T=7, V=53, packed=False, seed=0):
    """logits, targets and the layout's arguments; two groups of two, ragged."""
    logits, targets = make(B, T, V, device=DEVICE, seed=seed)
    lengths = torch.tensor([7, 5, 6, 3], device=DEVICE)
    mask = torch.arange(T, device=DEVICE)[None] < lengths[:, None]
    start = torch.tensor([5, 3, 9, 2], device=DEVICE)
    layout = {"completion_mask": mask, "answer_start": start, "group_size": 2}
    if packed:
        logits, targets = logits[mask], targets[mask]
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        layout = {"cu_seqlens": offsets, "answer_start": start, "group_size": 2}
    return logits, targets, layout


@each_backend
@pytest.mark.parametrize("packed", [False, True])
def test_a_linear_score_in_the_fused_functions_of_logits(packed, backend):
    """Score, advantages, loss and gradient are those of the reference in float64."""
    logits, targets, layout = problem(packed=packed)
    exact = logits.double().requires_grad_()
    want = reference.sega_loss(exact, targets, score=LINEAR, **layout)
    want.loss.backward()
    out = fused_entropy_score(logits, targets, score=LINEAR, backend=backend, **layout)
    for name in ("score", "final_entropy", "fork_entropy", "advantages", "logprobs", "entropy"):
        close(getattr(out, name), getattr(want, name), name)
    logits.requires_grad_()
    got = sega_loss(logits, targets, score=LINEAR, backend=backend, **layout)
    got.loss.backward()
    for name in ("loss", "score", "advantages"):
        close(getattr(got, name), getattr(want, name), name)
    close(logits.grad, exact.grad, "gradient")
    assert not got.score.requires_grad and want.advantages.abs().max() > 0.1


@pytest.mark.parametrize("function", [fused_entropy_score, sega_loss])
def test_a_score_has_weights_of_its_own(function):
    logits, targets, layout = problem()
    with pytest.raises(ValueError, match=r"`fork_weight` must be left out where `score` is given .*, got 2.0"):
        function(logits, targets, score=LINEAR, fork_weight=2.0, **layout)


@each_backend
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [40, 5], ids=["one shot", "two phase"])
def test_a_linear_score_from_hidden_states(rows, packed, backend):
    """The same, from hidden states, whole groups in the workspace or not."""
    V, D = 53, 8
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(V, D, generator=generator).to(DEVICE).requires_grad_()
    _, targets, layout = problem(V=V, packed=packed)
    hidden = torch.randn(*targets.shape, D, generator=generator).to(DEVICE).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = reference.sega_loss(exact[0] @ exact[1].t(), targets, score=LINEAR, **layout)
    want.loss.backward()
    options = {"score": LINEAR, "workspace_bytes": rows * V * 4, "backend": backend, **layout}
    out = fused_linear_entropy_score(hidden, weight, targets, **options)
    got = fused_linear_sega_loss(hidden, weight, targets, **options)
    got.loss.backward()
    assert got.path == ("one_shot" if rows == 40 else "two_phase")
    for name in ("score", "advantages"):
        scale = float(getattr(want, name).abs().max())
        close(getattr(out, name) / scale, getattr(want, name) / scale, name)
        close(getattr(got, name) / scale, getattr(want, name) / scale, name)
    for mine, theirs in zip((hidden, weight), exact):
        scale = float(theirs.grad.abs().max())
        close(mine.grad / scale, theirs.grad / scale, "gradient")
