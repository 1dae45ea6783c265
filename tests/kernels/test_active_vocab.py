"""The active vocabulary: exact at 0, its error falls with the threshold, and the error it reports is the error."""

from __future__ import annotations

import math

import pytest
import torch

from gem_kernels import fused_linear_policy_loss, fused_linear_sega_loss, linear_token_stats
from gem_kernels.linear import active_vocab
from tests.kernels.helpers import room

pytestmark = pytest.mark.usefixtures("one_thread")

V, D, N = 1501, 32, 160
WORKSPACE = room(V, 64)  # three chunks


def problem(peaked: bool = True, dtype=torch.float32, bias=None, seed=0):
    """A language's shape: words of very different frequency (in W's common direction), contexts that share some."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g)
    weight = torch.randn(V, D, generator=g)
    if peaked:
        hidden[:, 0] = 1 + 0.1 * torch.randn(N, generator=g)
        weight *= 0.6
        weight[:, 0] = -1.6 * torch.arange(1, V + 1).log()
        hidden[::5] *= 3  # confident rows
    else:
        weight *= 0.1  # nearly uniform rows
    targets = torch.randint(0, V, (N,), generator=g)
    if bias is not None:
        bias = bias.to(dtype)
    a = torch.randn(N, generator=g) * torch.randint(0, 3, (N,), generator=g)
    return hidden.to(dtype), weight.to(dtype), bias, targets, a


def token_loss(logprobs, entropy, a, b):
    return (a * logprobs).sum() + b * entropy.sum() if isinstance(b, float) else (a * logprobs + b * entropy).sum()


def run(hidden, weight, bias, targets, a, b=None, **options):
    """-> output, dHidden, dWeight."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    b = torch.zeros_like(a) if b is None else b
    options = {"workspace_bytes": WORKSPACE, **options}
    out = fused_linear_policy_loss(
        hidden, weight, targets, token_loss, token_inputs={"a": a, "b": b}, bias=bias, **options
    )
    out.loss.backward()
    return out, hidden.grad, weight.grad


def truth(hidden, weight, bias, targets, a, b=None):
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias.double()
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)
    logprobs = log_p.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    counted = targets != -100
    loss = (a.double() * logprobs)[counted].sum()
    if b is not None:
        loss = loss + (b.double() * entropy)[counted].sum()
    return torch.autograd.grad(loss, (hidden, weight))


def error(x, y):
    return float((x.double() - y).norm() / y.norm())


@pytest.mark.parametrize("peaked", (True, False))
def test_zero_is_exact_and_none_is_the_same_code(peaked):
    args = problem(peaked)
    plain, zero = run(*args), run(*args, active_vocab=0)
    assert torch.equal(plain[1], zero[1]) and torch.equal(plain[2], zero[2])
    assert plain[0].active_share is None and plain[0].active_error is None and plain[0].active_weight_error is None
    assert (zero[0].active_share, zero[0].active_error, zero[0].active_weight_error) == (1, 0, 0)
    assert torch.equal(plain[0].logprobs, zero[0].logprobs)


@pytest.mark.parametrize("with_entropy", (False, True))
def test_error_falls_with_the_threshold(with_entropy):
    args = problem()
    b = 0.3 * torch.randn(N, generator=torch.Generator().manual_seed(1)) if with_entropy else None
    exact = truth(*args, b)
    errors, shares = [], []
    for exponent in (6, 8, 10, 12):
        out, *grads = run(*args, b, active_vocab=2.0**-exponent)
        errors.append([error(x, y) for x, y in zip(grads, exact)])
        shares.append(float(out.active_share))
    assert shares == sorted(shares) and shares[0] < 0.1
    assert errors == sorted(errors, reverse=True)
    assert all(e[1] for e in errors) and [e[1] for e in errors] == sorted((e[1] for e in errors), reverse=True)
    assert errors[-1][0] < 4e-3 and errors[-1][1] < 4e-3


@pytest.mark.parametrize("peaked", (True, False))
def test_tail_beats_no_tail_and_more_directions_beat_the_mean(peaked, monkeypatch):
    args = problem(peaked)
    exact = truth(*args)
    threshold = 2**-8
    full = [error(x, y) for x, y in zip(run(*args, active_vocab=threshold)[1:], exact)]
    monkeypatch.setattr(active_vocab, "RANK", 1)
    mean = [error(x, y) for x, y in zip(run(*args, active_vocab=threshold)[1:], exact)]
    monkeypatch.setattr(active_vocab.ActiveProducts, "_tail", lambda *args: None)
    none = [error(x, y) for x, y in zip(run(*args, active_vocab=threshold)[1:], exact)]
    assert full[0] < mean[0] < none[0]
    assert full[1] < none[1] and mean[1] < none[1]


@pytest.mark.parametrize("exponent", (5, 8, 11))
@pytest.mark.parametrize("peaked", (True, False))
def test_reported_error_is_the_error(peaked, exponent):
    args = problem(peaked)
    out, *grads = run(*args, active_vocab=2.0**-exponent)
    exact = truth(*args)
    for reported, grad, y in zip((out.active_error, out.active_weight_error), grads, exact):
        true = error(grad, y)
        if true > 1e-5:  # rounding is not in the report
            assert true / 1.5 < float(reported) < true * 1.5
        else:
            assert float(reported) < 1e-5
    assert 0 < float(out.active_share) <= 1


@pytest.mark.parametrize("logits_dtype", (None, torch.float32))
def test_bfloat16(logits_dtype):
    """No worse than the dense products' own error in this dtype, and the approximation's."""
    args = problem(dtype=torch.bfloat16)
    exact = truth(*args)
    _, *dense = run(*args, logits_dtype=logits_dtype)
    out, *grads = run(*args, logits_dtype=logits_dtype, active_vocab=2**-10)
    for x, z, y, reported in zip(grads, dense, exact, (out.active_error, out.active_weight_error)):
        assert x.dtype == torch.bfloat16
        assert error(x, y) < 1.2 * math.hypot(error(z, y), 1.5 * float(reported))


def test_columns_of_targets_and_of_entropy_are_kept():
    hidden, weight, bias, targets, a = problem()
    # The rare words are targets; the rows are sure of others, so nothing else keeps these columns.
    targets = V - 1 - torch.arange(N) % 50
    gradient = torch.zeros(N, V)
    index = active_vocab.active_columns(gradient, targets, torch.ones(N), 0.5)
    assert index.tolist() == list(range(V - 50, V))
    gradient[3, 7] = -0.6
    assert 7 in active_vocab.active_columns(gradient, targets, torch.ones(N), 0.5).tolist()
    assert 7 not in active_vocab.active_columns(gradient, targets, 2 * torch.ones(N), 0.5).tolist()
    # A large weight on a row that is not counted does not raise the bar.
    weights = torch.ones(N)
    targets[0], weights[0] = -100, 100
    assert 7 in active_vocab.active_columns(gradient, targets, weights, 0.5).tolist()
    # Their dWeight is exact.
    targets = V - 1 - torch.arange(N) % 50
    _, _, grad = run(hidden, weight, bias, targets, a, active_vocab=2**-5, workspace_bytes=room(V, N))
    exact = truth(hidden, weight, bias, targets, a)[1]
    assert error(grad[V - 50 :], exact[V - 50 :]) < 1e-5
    assert error(grad, exact) > 1e-5


def test_masked_words_get_no_gradient():
    bias = torch.zeros(V)
    bias[torch.arange(0, V, 7)] = -torch.inf
    hidden, weight, bias, targets, a = problem(bias=bias)
    targets = torch.where(targets % 7 == 0, 1, targets)
    out, *grads = run(hidden, weight, bias, targets, a, active_vocab=2**-10)
    exact = truth(hidden, weight, bias, targets, a)
    assert error(grads[0], exact[0]) < 2e-2 and error(grads[1], exact[1]) < 2e-2
    assert float(grads[1][::7].abs().max()) == 0
    assert float(out.active_share) < active_vocab.DENSE_SHARE


def test_rows_without_weight_keep_no_columns():
    hidden, weight, bias, targets, a = problem()
    some = a.clone()
    some[N // 2 :] = 0
    targets[N // 2 :] = targets[0]
    share = [
        float(run(hidden, weight, bias, targets, w, active_vocab=2**-10, workspace_bytes=room(V, N))[0].active_share)
        for w in (a, some)
    ]
    assert share[1] < share[0]
    out, *grads = run(hidden, weight, bias, targets, 0 * a, active_vocab=2**-10)
    assert float(grads[0].abs().max()) == float(grads[1].abs().max()) == 0
    assert (out.active_error, out.active_weight_error) == (0, 0)


def test_softcap_temperature_and_one_needed_gradient():
    hidden, weight, _, targets, a = problem()
    taus = 0.5 + torch.rand(N, generator=torch.Generator().manual_seed(2))
    options = {"softcap": 20.0, "temperature": taus}
    _, *exact = run(hidden, weight, None, targets, a, **options)
    out, *grads = run(hidden, weight, None, targets, a, active_vocab=2**-10, **options)
    for reported, x, y in zip((out.active_error, out.active_weight_error), grads, exact):
        assert 1e-5 < error(x, y.double()) < 2e-2
        assert error(x, y.double()) / 1.5 < float(reported) < error(x, y.double()) * 1.5
    inputs = {"a": a, "b": torch.zeros_like(a)}
    options |= {"token_inputs": inputs, "workspace_bytes": WORKSPACE, "active_vocab": 2**-10}
    alone = hidden.clone().requires_grad_()
    frozen = fused_linear_policy_loss(alone, weight, targets, token_loss, **options)
    frozen.loss.backward()
    assert torch.equal(alone.grad, grads[0]) and frozen.active_weight_error is None
    alone = weight.clone().requires_grad_()
    frozen = fused_linear_policy_loss(hidden, alone, targets, token_loss, **options)
    frozen.loss.backward()
    assert error(alone.grad, exact[1].double()) < 2e-2 and frozen.active_error is None


def test_not_a_number_goes_where_it_would():
    hidden, weight, bias, targets, a = problem()
    hidden[5, 0] = torch.nan
    _, grad, _ = run(hidden, weight, bias, targets, a, active_vocab=2**-10)
    assert grad[5].isnan().all() and grad[:5].isfinite().all() and grad[6:].isfinite().all()


@pytest.mark.parametrize("workspace_bytes", (WORKSPACE, room(V, N)))
def test_sega_both_paths(workspace_bytes):
    hidden, weight, _, targets, _ = problem()
    batch = {
        "completion_mask": torch.ones(16, 10, dtype=torch.bool),
        "answer_start": torch.full((16,), 7),
        "group_size": 8,
        "workspace_bytes": workspace_bytes,
    }
    results = []
    for threshold in (None, 2**-10):
        h, w = hidden.view(16, 10, D).clone().requires_grad_(), weight.clone().requires_grad_()
        out = fused_linear_sega_loss(h, w, targets.view(16, 10), active_vocab=threshold, **batch)
        out.loss.backward()
        results.append((out, h.grad, w.grad))
    (plain, *exact), (out, *grads) = results
    assert out.path == plain.path == ("one_shot" if workspace_bytes > WORKSPACE else "two_phase")
    assert torch.equal(out.loss, plain.loss) and plain.active_share is None
    for reported, x, y in zip((out.active_error, out.active_weight_error), grads, exact):
        assert 1e-6 < error(x, y.double()) < 2e-2
        assert error(x, y.double()) / 1.5 < float(reported) < error(x, y.double()) * 1.5
    assert 0 < float(out.active_share) < 0.6


def test_linear_token_stats():
    hidden, weight, _, targets, a = problem()
    grads = []
    for threshold in (None, 0, 2**-10):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_token_stats(h, w, targets, workspace_bytes=WORKSPACE, active_vocab=threshold)
        (out.logprobs * a + 0.1 * a * out.entropy).sum().backward()
        grads.append((h.grad, w.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])
    for x, y in zip(grads[2], grads[0]):
        assert 1e-6 < error(x, y.double()) < 2e-2


def test_same_bits_twice_and_the_callers_random_state_is_left_alone():
    args = problem()
    state = torch.random.get_rng_state()
    first, second = (run(*args, active_vocab=2**-9) for _ in range(2))
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("rows", (16, 64), ids=["a slice at a time", "whole"])
def test_a_weight_of_another_dtype(rows):
    """As one converted by the caller: the same columns, and the same gradients up to rounding."""
    low = torch.bfloat16
    hidden, weight, bias, targets, a = problem()
    options = {"active_vocab": 2**-10, "workspace_bytes": room(V, rows, low)}
    want, *exact = run(hidden.to(low), weight.to(low), bias, targets, a, **options)
    out, *grads = run(hidden.to(low), weight, bias, targets, a, compute_dtype=low, **options)
    assert out.active_share == want.active_share < active_vocab.DENSE_SHARE
    assert [x.dtype for x in grads] == [low, torch.float32]
    for x, y in zip(grads, exact):
        assert error(x, y.double()) < 2.0**-8


@pytest.mark.parametrize("n", (1, 2, 17))
def test_few_rows(n):
    hidden, weight, bias, targets, _ = problem()
    args = (hidden[:n], weight, bias, targets[:n], torch.ones(n))
    _, *grads = run(*args, active_vocab=2**-8)
    for x, y in zip(grads, truth(*args)):
        assert error(x, y) < (1e-5 if n <= active_vocab.RANK else 2e-2)  # so few rows are their own basis


@pytest.mark.parametrize("value", (-0.1, 1, 1.0, True, "2**-12", float("nan"), float("inf"), torch.tensor(0.1)))
def test_bad_input(value):
    hidden, weight, bias, targets, a = problem()
    with pytest.raises(ValueError, match="active_vocab"):
        run(hidden, weight, bias, targets, a, active_vocab=value)
    with pytest.raises(ValueError, match="active_vocab"):
        linear_token_stats(hidden, weight, targets, active_vocab=value)
    with pytest.raises(ValueError, match="vocab_parallel"):
        active_vocab.check_threshold(0.1, sharded=True)
