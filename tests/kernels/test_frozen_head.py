"""SEGA where only the hidden states need a gradient, and gradients that wait for an upstream scalar in float16."""

from __future__ import annotations

import pytest
import torch

import gem_kernels
from gem_kernels import reference
from tests.kernels.helpers import LINEAR_BACKENDS, assert_near, distance, needs_backend, problem, room, sequences

pytestmark = pytest.mark.usefixtures("one_thread")


def frozen(p, layout, **options):
    hidden = p.hidden.detach().clone().requires_grad_()
    out = gem_kernels.fused_linear_sega_loss(
        hidden, p.weight, p.targets, bias=p.bias, **layout, **p.options, workspace_bytes=room(203, 5), **options
    )
    assert out.path == "one_shot"
    return hidden, out


def exact_gradient(p, layout, **options):
    hidden = p.hidden.double().requires_grad_()
    logits = hidden @ p.weight.double().t() + p.bias.double()
    reference.sega_loss(logits, p.targets, **layout, **options).loss.backward()
    return hidden.grad


@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_the_gradient_is_float64_s(backend, layout, device):
    """Groups of about 40 rows, five rows a chunk."""
    needs_backend(backend, device)
    p, layout = sequences(device)[layout]
    hidden, out = frozen(p, layout, backend=backend)
    out.loss.backward()
    assert distance(hidden.grad, exact_gradient(p, layout)) < 1e-5


@pytest.mark.parametrize("mapping", ["identity", "softmax", "rank"])
@pytest.mark.parametrize("loss_type", ["sum", "mean", "token"])
def test_weighing_later_is_weighing_at_once(loss_type, mapping, device):
    p, layout = sequences(device)[0]
    options = {"mapping": mapping, "scale": "group", "loss_type": loss_type}
    hidden, out = frozen(p, layout, **options)
    (out.loss / 3).backward()
    again, given = frozen(p, layout, loss_type=loss_type, advantages=out.advantages)
    (given.loss / 3).backward()
    assert distance(hidden.grad, again.grad) < 1e-6
    assert_near(out.loss, given.loss)


def test_the_scale_is_rounded_once(device):
    """bfloat16 results of float32 products are the bfloat16 numbers next to the truth, but for near ties."""
    p, layout = sequences(device, dtype=torch.bfloat16)[0]
    hidden, out = frozen(p, layout, logits_dtype=torch.float32)
    out.loss.backward()
    exact = exact_gradient(p, layout | {"group_size": 3}, advantages=out.advantages.double())
    assert float((hidden.grad == exact.bfloat16()).double().mean()) > 0.99


def test_a_row_of_weight_zero_is_selected_away(device):
    p, layout = sequences(device)[0]
    valid = torch.tensor([True, False, True, True, True, True], device=device)
    clean, out = frozen(p, layout, valid=valid)
    out.loss.backward()
    p.hidden[1] = torch.nan
    hidden, _ = frozen(p, layout, valid=valid)
    # The loss itself is 0 * NaN; the gradient is asked for at 1.
    frozen_loss = gem_kernels.fused_linear_sega_loss(
        hidden, p.weight, p.targets, bias=p.bias, **layout, valid=valid, workspace_bytes=room(203, 5)
    ).loss
    (grad,) = torch.autograd.grad(frozen_loss, hidden)
    assert torch.equal(grad, clean.grad) and not grad[1].any()


# ---- float16 under a loss scaler

TOKENS = 200_000  # the loss is a mean over so many: dL/dlogits is below float16's smallest number


def mean_policy(logprobs, entropy):
    return -(logprobs + 0.1 * entropy).sum() / TOKENS


def scaled_losses(p, leaves, layout, options):
    advantages = torch.linspace(-1, 1, 6, device=p.hidden.device)
    sega = {"targets": p.targets, **leaves, **layout, **options, "denominator": float(TOKENS)}
    return {
        "policy": lambda: (
            gem_kernels.fused_linear_policy_loss(
                targets=p.targets.masked_fill(~layout["completion_mask"], -100),
                token_loss=mean_policy,
                **leaves,
                **options,
            ).loss
        ),
        "sega": lambda: gem_kernels.fused_linear_sega_loss(**sega).loss,
        "sega, given advantages": lambda: gem_kernels.fused_linear_sega_loss(**sega, advantages=advantages).loss,
    }


@pytest.mark.parametrize("path", ["policy", "sega", "sega, given advantages"])
@pytest.mark.parametrize("rows", [5, 10_000], ids=["chunks", "one chunk"])
@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=["float16 logits", "float32 logits"])
@pytest.mark.parametrize("needed", ["all", "hidden"])
def test_float16_under_a_loss_scaler(needed, logits_dtype, rows, path, device):
    p, layout = sequences(device, dtype=torch.float16, D=32)[0]
    options = {"workspace_bytes": room(203, rows), "logits_dtype": logits_dtype}
    found = {}
    for kind in (torch.float32, torch.float16):
        leaves = p.leaves(kind)
        for name, leaf in leaves.items():
            leaf.requires_grad_(needed in ("all", name))
        more = options if kind == torch.float16 else {}
        loss = scaled_losses(p, leaves, layout, more)[path]()
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16)
        scaler.scale(loss).backward()
        found[kind] = {name: leaf.grad.double() / 2**16 for name, leaf in leaves.items() if leaf.requires_grad}
        assert all(leaf.grad.dtype == kind for leaf in leaves.values() if leaf.requires_grad)
    for name, exact in found[torch.float32].items():
        # Advantages that come from float16 logits are off by more than the products.
        budget = 2.0**-6 if path == "sega" and logits_dtype is None else 2.0**-9
        assert distance(found[torch.float16][name], exact) < budget, name
        assert 0 < exact.abs().max() < 6e-5, "the test asks nothing: float16 holds these"


def test_bfloat16_pays_nothing_for_it(device):
    """Its gradients wait in bfloat16, and are not scaled twice."""
    p = problem(12, dtype=torch.bfloat16, device=device, ignored=0.0, bias=False)
    out = gem_kernels.fused_linear_policy_loss(targets=p.targets, token_loss=mean_policy, **p.leaves())
    waiting = [g for g in out.loss.grad_fn.gradients if g is not None]
    assert {g.dtype for g in waiting} == {torch.bfloat16} and len(waiting) == 2
