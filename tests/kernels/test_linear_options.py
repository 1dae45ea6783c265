"""Rows that the caller knows, autocast around the call, and losses that capture what they should be given."""

from __future__ import annotations

import pytest
import torch

import gem_kernels
from tests.kernels.helpers import IGNORE, good, paths, policy, problem, room

pytestmark = pytest.mark.usefixtures("one_thread")


def policy_of(stats):
    return policy(stats.logprobs, stats.entropy)


CALLS = {
    "stats": lambda **o: policy_of(gem_kernels.linear_token_stats(**o)),
    "policy": lambda **o: gem_kernels.fused_linear_policy_loss(token_loss=policy, **o).loss,
}


@pytest.mark.parametrize("call", CALLS)
def test_rows_are_those_that_count(call, device):
    """As if all others were ignored; what stands there is not looked at."""
    p = problem(4, 6, device=device, temperature=torch.rand(4, 6) + 0.5)
    rows = torch.tensor([0, 3, 4, 10, 11, 23])
    outside = torch.ones(24, dtype=torch.bool).index_fill_(0, rows, False).view(4, 6).to(device)
    want, got = p.leaves(), p.leaves()
    loss = CALLS[call](targets=p.targets.masked_fill(outside, IGNORE), **want, **p.options)
    loss.backward()
    other = CALLS[call](targets=p.targets.masked_fill(outside, 10**6), rows=rows, **got, **p.options)
    other.backward()
    assert torch.equal(loss, other) and outside.any()
    for name in want:
        assert torch.equal(want[name].grad, got[name].grad), name


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "rows",
    [
        [0, 1], torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor([0, 3]), torch.tensor([-1, 0]),
        torch.tensor([1, 0]), torch.tensor([1, 1]), torch.tensor([0], device="meta"),
    ],
    ids=["list", "float", "2-d", "too large", "negative", "falling", "twice", "another device"],
)  # fmt: skip
def test_bad_rows(call, rows):
    with pytest.raises(ValueError, match=r"^`rows` must be .*, got "):
        CALLS[call](**good(), rows=rows)


def test_no_rows_and_all_rows(device):
    p = problem(7, device=device)
    none = gem_kernels.linear_token_stats(p.hidden, p.weight, p.targets, rows=torch.empty(0, dtype=torch.int64))
    assert not none.logprobs.any() and not none.entropy.any()
    every = gem_kernels.linear_token_stats(p.hidden, p.weight, p.targets, rows=torch.arange(7))
    assert torch.equal(every.logprobs, gem_kernels.linear_token_stats(p.hidden, p.weight, p.targets).logprobs)


# ---- autocast


@pytest.mark.parametrize("path", ["stats", "score", "sega, given advantages", "sega, two phase", "policy"])
@pytest.mark.parametrize("rows", [2, 30], ids=["two rows a chunk", "30"])
@pytest.mark.parametrize("active_vocab", [None, 2.0**-6])
def test_autocast_changes_nothing_of_a_given_dtype(path, rows, active_vocab, device):
    """Float32 products stay float32: of chunks of few rows, and of the active vocabulary."""
    if active_vocab is not None and path == "score":
        pytest.skip("fused_linear_entropy_score has no active_vocab")
    p = problem(60, V=400, D=16, device=device, bias=False, ignored=0.0)
    options = {"compute_dtype": torch.float32} | ({} if active_vocab is None else {"active_vocab": active_vocab})
    results = []
    for on in (False, True):
        leaves = p.leaves()
        run = paths(p, leaves | options, room(400, rows))[path]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on):
            loss = run()
            loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves.values())])
    for want, got in zip(*results):
        assert torch.equal(want, got)


# ---- what token_loss captures


@pytest.mark.parametrize("leaf", [True, False], ids=["a parameter", "the output of a model"])
def test_a_captured_tensor_that_needs_a_gradient_is_refused(leaf, device):
    p = problem(6, device=device)
    coefficient = torch.ones((), device=device, requires_grad=True)
    captured = coefficient if leaf else coefficient * 2

    def token_loss(logprobs, entropy):
        return -(logprobs + captured * entropy).sum()

    message = r"^`token_loss` must be .*, got one that uses a tensor \(\) with requires_grad=True$"
    with pytest.raises(ValueError, match=message):
        gem_kernels.fused_linear_policy_loss(p.hidden.requires_grad_(), p.weight, p.targets, token_loss)
    with torch.no_grad():
        gem_kernels.fused_linear_policy_loss(p.hidden, p.weight, p.targets, token_loss)
    captured = captured.detach()
    gem_kernels.fused_linear_policy_loss(p.hidden, p.weight, p.targets, token_loss).loss.backward()
    assert p.hidden.grad.any() and coefficient.grad is None


@pytest.mark.parametrize("path", ["stats", "sega, given advantages", "policy"])
def test_functorch_and_forward_mode_are_refused(path, device):
    p = problem(6, device=device, bias=False, ignored=0.0)

    def loss(hidden):
        return paths(p, {"hidden": hidden, "weight": p.weight}, 1 << 20)[path]()

    with pytest.raises(RuntimeError):
        torch.func.grad(loss)(p.hidden)
    with torch.autograd.forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        loss(torch.autograd.forward_ad.make_dual(p.hidden, torch.ones_like(p.hidden)))
