"""sega_loss: worked by hand, against float64 autograd of the reference, and split into micro-batches."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import gem_kernels
from gem_kernels import reference, sega_loss
from tests.kernels.helpers import BACKENDS, DTYPES, EPS, assert_near, make

pytestmark = pytest.mark.usefixtures("poisoned_empty")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
LOSS_TYPES = ["sum", "mean", "token", "constant"]
each_loss_type = pytest.mark.parametrize("loss_type", LOSS_TYPES)
# What differs by loss type comes after the kernels, which take seconds in the interpreter.
one_triton = pytest.mark.parametrize("loss_type,backend", [*((x, "torch") for x in LOSS_TYPES), ("mean", "triton")])


def batch(device="cpu", dtype=torch.float32, V=50):
    """Four completions of 8, 5, 1 and 6 tokens (the last with a prompt before it); row 2 has no reasoning."""
    logits, targets = make(4, 8, V, dtype=dtype, device=device)
    mask = torch.arange(8, device=device)[None] < torch.tensor([8, 5, 1, 8], device=device)[:, None]
    mask[3, :2] = False
    arguments = {
        "answer_start": torch.tensor([6, 3, 0, 4], device=device),
        "group_size": 2,
        "top_m": 0.4,
        "max_completion_length": 8,
    }
    return logits, targets, mask, arguments


# Two words and equal logits: every log-prob is -log 2. Completions of 2, 1 and 3 tokens with advantages 1, -2, 3:
# sum_t logprob = -log 2 * (2, 1, 3), so sum_i A_i sum_t logprob = -log 2 * (2 - 2 + 9) = -9 log 2.
BY_HAND = {
    "sum": 9 / 3,  # Z = 3 sequences
    "mean": (1 - 2 + 3) / 3,  # each divided by its length first: 2/2, -2/1, 9/3
    "token": 9 / 6,  # Z = 6 tokens
    "constant": 9 / (3 * 4),  # Z = 3 * max_completion_length
}
# The second one (A = -2) invalid: 2 + 9 = 11; two sequences, five tokens.
BY_HAND_WITHOUT_THE_SECOND = {"sum": 11 / 2, "mean": (1 + 3) / 2, "token": 11 / 5, "constant": 11 / (2 * 4)}


@each_backend
@each_loss_type
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_by_hand(layout, loss_type, backend, device):
    mask = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 1, 1]], dtype=torch.bool, device=device)
    logits = torch.zeros(3, 3, 2, device=device)
    targets = torch.tensor([[0, 1, 1], [0, 1, 0], [1, 1, 0]], device=device)
    where = {"completion_mask": mask}
    if layout == "packed":
        logits, targets = logits[mask], targets[mask]
        where = {"cu_seqlens": torch.tensor([0, 2, 3, 6], dtype=torch.int32, device=device)}
    advantages = torch.tensor([1.0, -2.0, 3.0], device=device)
    arguments = {**where, "advantages": advantages, "loss_type": loss_type, "max_completion_length": 4}
    logits.requires_grad_()
    out = sega_loss(logits, targets, **arguments, backend=backend)
    assert out.loss.item() == pytest.approx(BY_HAND[loss_type] * math.log(2), rel=1e-6)
    # dL/dz at the target: -A c / Z * (1 - 1/2); the first token of the third completion
    out.loss.backward()
    factor = {"sum": 3 / 3, "mean": 3 / 3 / 3, "token": 3 / 6, "constant": 3 / 12}[loss_type]
    at = (-3, 1) if layout == "packed" else (2, 0, 1)
    assert logits.grad[at].item() == pytest.approx(-factor / 2, rel=1e-6)
    # as in a step whose Z is 10
    out = sega_loss(logits, targets, **arguments, denominator=10.0, backend=backend)
    total = 2.0 if loss_type == "mean" else 9.0
    assert out.loss.item() == pytest.approx(total / 10 * math.log(2), rel=1e-6)
    valid = torch.tensor([True, False, True], device=device)
    out = sega_loss(logits, targets, **arguments, valid=valid, backend=backend)
    assert out.loss.item() == pytest.approx(BY_HAND_WITHOUT_THE_SECOND[loss_type] * math.log(2), rel=1e-6)
    assert out.advantages.tolist() == [1.0, 0.0, 3.0]


@each_backend
def test_advantages_by_hand_from_entropies(backend, device):
    """Entropies log 1 or log 2, by masking words: S = -H_final + H_fork = (-0 + log 2, -log 2 + 0), so A = +-log 2."""
    two, one = [0.0, 0.0], [0.0, -math.inf]
    logits = torch.tensor([[two, one], [one, two]], device=device).requires_grad_()
    targets = torch.zeros(2, 2, dtype=torch.int64, device=device)
    mask, start = torch.ones(2, 2, dtype=torch.bool, device=device), torch.tensor([1, 1], device=device)
    out = sega_loss(logits, targets, completion_mask=mask, answer_start=start, group_size=2, backend=backend)
    log2 = math.log(2)
    assert out.score.tolist() == pytest.approx([log2, -log2]) and out.advantages.tolist() == pytest.approx(
        [log2, -log2]
    )
    # both sequences have log-probs summing to -log 2: the loss cancels, the gradient does not
    assert out.loss.item() == pytest.approx(0.0, abs=1e-6)
    out.loss.backward()
    assert logits.grad[0, 0].tolist() == pytest.approx([-log2 / 4, log2 / 4])  # -A / Z * (1 - p), Z = 2
    assert logits.grad[0, 1].tolist() == [0.0, 0.0]


@each_backend
@pytest.mark.parametrize(
    "loss_type,dtype", [*((x, torch.float32) for x in LOSS_TYPES), *(("mean", x) for x in DTYPES[1:])], ids=str
)
def test_against_float64(dtype, loss_type, backend, device):
    logits, targets, mask, arguments = batch(device, dtype)
    arguments |= {"scale": "group", "temperature": 0.7, "softcap": 20.0, "loss_type": loss_type}
    targets[0, 2] = -100  # an ignored token within a completion
    exact = logits.double().requires_grad_()
    want = reference.sega_loss(exact, targets, completion_mask=mask, **arguments)
    want.loss.backward()
    logits[~mask] = torch.nan
    logits[0, 2] = torch.nan
    z = logits.requires_grad_()
    out = sega_loss(z, targets, completion_mask=mask, **arguments, backend=backend)
    out.loss.backward()
    # Of fp32: a sum of 20 log-probs of size 10 and advantages; the deviation of two scores magnifies their rounding.
    torch.testing.assert_close(out.loss.double(), want.loss, rtol=2e-5, atol=2e-5)
    assert_near(out.advantages.double(), want.advantages.double(), 4e-5)
    assert torch.equal(out.valid, want.valid)
    size = exact.grad.abs().amax(-1, keepdim=True)
    # 2: the interpreter truncates to bf16 where a GPU rounds to nearest.
    assert ((z.grad.double() - exact.grad).abs() <= 2 * EPS[dtype] * exact.grad.abs() + 3e-5 * size + 2.0**-24).all()
    assert (z.grad[~mask] == 0).all()
    for name in ("score", "final_entropy", "fork_entropy", "advantages", "logprobs", "entropy"):
        assert not getattr(out, name).requires_grad


@one_triton
def test_packed_equals_padded(loss_type, backend, device):
    logits, targets, mask, arguments = batch(device)
    offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    padded, packed = logits.clone().requires_grad_(), logits[mask].clone().requires_grad_()
    x = sega_loss(padded, targets, completion_mask=mask, **arguments, loss_type=loss_type, backend=backend)
    y = sega_loss(packed, targets[mask], cu_seqlens=offsets, **arguments, loss_type=loss_type, backend=backend)
    torch.testing.assert_close(x.loss, y.loss)
    (x.loss + y.loss).backward()
    assert_near(padded.grad[mask], packed.grad, 2.0**-20)
    assert torch.equal(x.advantages, y.advantages)


@one_triton
def test_micro_batches_with_a_denominator_change_nothing(loss_type, backend, device):
    """Z of the whole step, as a number or a tensor; one group at a time."""
    logits, targets, mask, arguments = batch(device)
    arguments["valid"] = torch.tensor([True, True, False, True], device=device)
    whole, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    want = sega_loss(whole, targets, completion_mask=mask, **arguments, loss_type=loss_type, backend=backend)
    want.loss.backward()
    Z = {"sum": 3, "mean": 3, "token": 8 + 5 + 6, "constant": 3 * 8}[loss_type]
    total = 0.0
    for i, denominator in enumerate((Z, torch.tensor(Z, device=device))):
        half = slice(2 * i, 2 * i + 2)
        some = {k: v[half] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        out = sega_loss(
            parts[half], targets[half], completion_mask=mask[half], **some, loss_type=loss_type,
            denominator=denominator, backend=backend,
        )  # fmt: skip
        out.loss.backward()
        total += out.loss.item()
    assert total == pytest.approx(want.loss.item(), rel=1e-5, abs=1e-6)
    assert_near(parts.grad, whole.grad)


@each_backend
def test_given_advantages_equal_computed_ones(backend, device):
    logits, targets, mask, arguments = batch(device)
    first = sega_loss(logits, targets, completion_mask=mask, **arguments, backend=backend)
    again = sega_loss(logits, targets, completion_mask=mask, advantages=first.advantages.double(), backend=backend)
    torch.testing.assert_close(again.loss, first.loss)
    assert torch.equal(again.advantages, first.advantages)


@one_triton
def test_invalid_sequences_count_for_nothing(loss_type, backend, device):
    """Whatever their logits and advantages: loss and gradient are those of a batch without them."""
    logits, targets, mask, arguments = batch(device)
    arguments |= {"loss_type": loss_type, "backend": backend, "group_size": 4}
    arguments["valid"] = torch.tensor([True, True, False, True], device=device)
    z = logits.clone().requires_grad_()
    out = sega_loss(z, targets, completion_mask=mask, **arguments)
    out.loss.backward()
    assert (z.grad[2] == 0).all() and z.grad[[0, 1, 3]].abs().sum() > 0 and out.advantages[2] == 0
    kept = [0, 1, 3]
    some = {k: v[kept] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()} | {"group_size": 3}
    want = sega_loss(logits[kept], targets[kept], completion_mask=mask[kept], **some)
    torch.testing.assert_close(out.loss, want.loss)
    given = torch.tensor([1.0, 2.0, math.nan, 3.0], device=device)
    assert sega_loss(logits, targets, completion_mask=mask, **arguments, advantages=given).loss.isfinite()


@one_triton
def test_nothing_valid_is_a_loss_of_zero(loss_type, backend, device):
    logits, targets, mask, arguments = batch(device)
    for more in (
        {"valid": torch.zeros(4, dtype=torch.bool, device=device)},
        {"denominator": 0.0},
        {"denominator": torch.tensor(0, device=device)},
    ):
        z = logits.clone().requires_grad_()
        out = sega_loss(z, targets, completion_mask=mask, **arguments, **more, loss_type=loss_type, backend=backend)
        out.loss.backward()
        assert out.loss == 0 and (z.grad == 0).all()
    z = logits.clone().requires_grad_()
    out = sega_loss(z, targets, completion_mask=mask & False, **arguments, loss_type=loss_type, backend=backend)
    out.loss.backward()
    assert out.loss == 0 and (z.grad == 0).all() and not out.valid.any()


@each_backend
def test_in_place_backward(backend, device):
    logits, targets, mask, arguments = batch(device)
    grads = []
    for inplace in (False, True):
        z = logits.clone().requires_grad_()
        sega_loss(
            z, targets, completion_mask=mask, **arguments, inplace_backward=inplace, backend=backend
        ).loss.backward()
        assert (z.grad.data_ptr() == z.data_ptr()) is inplace
        grads.append(z.grad)
    assert torch.equal(*grads)


@each_backend
def test_no_sequences(backend, device):
    logits = torch.zeros(0, 8, 50, device=device, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    mask = torch.zeros(0, 8, dtype=torch.bool, device=device)
    out = sega_loss(logits, mask.long(), completion_mask=mask, answer_start=empty, group_size=2, backend=backend)
    out.loss.backward()
    assert out.loss == 0 and out.advantages.shape == (0,)


def test_no_warnings():
    logits, targets, mask, arguments = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sega_loss(logits.requires_grad_(), targets, completion_mask=mask, **arguments).loss.backward()


def test_a_step_against_its_gradient_raises_what_it_should(device):
    """Gradient descent on the loss raises the log-probs of the better completion and lowers the other's."""
    logits, targets, mask, arguments = batch(device)
    z = logits.clone().requires_grad_()
    out = sega_loss(z, targets, completion_mask=mask, **arguments)
    out.loss.backward()
    after = gem_kernels.token_stats(logits - 0.01 * z.grad, targets.masked_fill(~mask, -100)).logprobs.sum(1)
    moved = after - out.logprobs.sum(1)
    assert ((moved * out.advantages) > 0).all()


@pytest.mark.parametrize("path", ["logits", "reference", "one_shot", "two_phase", "frozen"])
def test_an_impossible_target_without_weight_counts_for_nothing(path, device):
    """0 * -inf: a masked word (bias or logit of -inf) as the target of an invalid sequence must not make a NaN."""
    hidden = torch.randn(2, 3, 4, device=device, generator=torch.Generator(device).manual_seed(0))
    weight = torch.randn(5, 4, device=device, generator=torch.Generator(device).manual_seed(1))
    bias = torch.zeros(5, device=device)
    bias[2] = -torch.inf
    targets = torch.tensor([[0, 1, 3], [2, 2, 4]], device=device)
    hidden.requires_grad_()
    options = {
        "completion_mask": torch.ones(2, 3, dtype=torch.bool, device=device),
        "valid": torch.tensor([True, False], device=device),
        "advantages": torch.tensor([2.0, 5.0], device=device),
    }
    if path in ("one_shot", "two_phase", "frozen"):
        if path != "one_shot":  # the advantages are the group's own, and the group of two does not fit the workspace
            options = {**options, "advantages": None, "answer_start": torch.ones(2, dtype=torch.int64, device=device)}
            options |= {"group_size": 2, "workspace_bytes": 1, "valid": torch.tensor([True, False], device=device)}
        weight.requires_grad_(path != "frozen")
        out = gem_kernels.fused_linear_sega_loss(hidden, weight, targets, bias=bias, **options)
        assert out.path == ("two_phase" if path == "two_phase" else "one_shot")
    else:
        function = sega_loss if path == "logits" else reference.sega_loss
        out = function(hidden @ weight.t() + bias, targets, **options)
    truth = 0.0 if path in ("two_phase", "frozen") else -2.0 * float(out.logprobs[0].sum())
    assert bool(out.logprobs[1, :2].isneginf().all())
    assert out.loss.item() == pytest.approx(truth, rel=1e-5)
    out.loss.backward()
    assert bool(hidden.grad.isfinite().all())
    assert bool((hidden.grad[1] == 0).all())
