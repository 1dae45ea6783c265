"""Gradients of the functions of logits: over the logits themselves, in torch.func, twice; and what a call launches."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import gem_kernels
from gem_kernels import logit_stats
from tests.kernels.helpers import BACKENDS, DTYPES, IGNORE, Recorder, assert_near, backward, make, upstream

pytestmark = pytest.mark.usefixtures("poisoned_empty")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# The gradient over the logits.


@each_backend
@each_dtype
@pytest.mark.parametrize("V", [301, 8195])
def test_in_place_equals_out_of_place(V, dtype, backend, device):
    logits, targets = make(3, V, dtype=dtype, device=device)
    targets[1] = IGNORE
    a, b = upstream(targets.shape, device=device)
    grads = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        stats = gem_kernels.token_stats(leaf, targets, temperature=0.7, inplace_backward=inplace, backend=backend)
        backward(stats, a, b)
        assert (leaf.grad.data_ptr() == leaf.data_ptr()) is inplace
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@each_backend
def test_in_place_passes_on_to_the_layer_before(backend, device):
    hidden = torch.randn(4, 8, device=device)
    weight = torch.randn(60, 8, device=device).requires_grad_()
    targets = torch.arange(4, device=device)
    grads = []
    for inplace in (False, True):
        logits = hidden @ weight.t()
        stats = gem_kernels.token_stats(logits, targets, inplace_backward=inplace, backend=backend)
        grads.append(torch.autograd.grad((stats.logprobs - stats.entropy).sum(), weight)[0])
    assert_near(*grads, 2.0**-20)


@each_backend
def test_in_place_leaves_the_memory_around_a_view_alone(backend, device):
    memory, _ = make(2, 4, 310, device=device)
    before = memory.clone()
    logits = memory[:, 1:3, 4:305].detach().requires_grad_()
    targets = torch.tensor([[0, IGNORE], [300, 7]], device=device)
    stats = gem_kernels.token_stats(logits, targets, inplace_backward=True, backend=backend)
    backward(stats, *upstream(targets.shape, device=device))
    assert (memory[0, 2, 4:305] == 0).all() and not torch.equal(memory[1, 1, 4:305], before[1, 1, 4:305])
    memory[:, 1:3, 4:305] = before[:, 1:3, 4:305]
    assert torch.equal(memory, before)


@each_backend
def test_a_second_backward_in_place_is_refused(backend, device):
    logits, targets = make(2, 50, device=device)
    logits = logits.requires_grad_() * 1.0
    stats = gem_kernels.token_stats(logits, targets, inplace_backward=True, backend=backend)
    stats.logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stats.logprobs.sum().backward()


SLICES = {
    "all but the last": lambda x: x[:, :-1],
    "the last of them": lambda x: x[:, -3:],
    "part of all axes": lambda x: x[1:, 1:-1, 2:300],
    "one slice of another": lambda x: x[:, 1:][:, :-1],
}


@pytest.mark.parametrize("case,backend", [(c, b) for c in SLICES for b in BACKENDS if b != "triton" or "last" in c])
def test_in_place_of_a_slice_makes_no_copy(case, backend, device):
    """model(ids).logits[:, :-1], say. Autograd's own gradient of a slice is a tensor of the size of the whole."""
    hidden, weight = torch.randn(4, 9, 2, device=device), torch.randn(2, 301, device=device)
    if backend == "triton":
        hidden = hidden[:, :5]
    grads = []
    for inplace in (False, True):
        w = weight.clone().requires_grad_()
        memory = hidden @ w
        logits = SLICES[case](memory)
        targets = torch.arange(logits.shape[:-1].numel(), device=device).view(logits.shape[:-1]) % logits.shape[-1]
        targets[0] = IGNORE
        stats = gem_kernels.token_stats(logits, targets, inplace_backward=inplace, backend=backend)
        a, b = upstream(targets.shape, device=device)
        with Recorder() as seen:
            (grad,) = torch.autograd.grad([stats.logprobs, stats.entropy], w, [a, b])
        grads.append(grad)
        most = max(size for size, _, _ in seen.made)
        assert (most >= logits.nbytes) is not inplace, seen.made
    assert_near(grads[1], grads[0], 2.0**-20)
    elsewhere = torch.ones_like(memory)
    SLICES[case](elsewhere).zero_()
    assert not memory[elsewhere.bool()].any(), "what is outside of the slice has gradient 0"


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_in_place_of_what_is_no_plain_slice(backend, device):
    """The usual way: a hook on the slice, another tensor between, steps, the slice of a leaf's detached alias."""
    weight = torch.randn(2, 60, device=device)
    targets = torch.arange(6, device=device).view(2, 3)
    a, b = upstream(targets.shape, device=device)

    def gradient(view, inplace, hook=False):
        w = weight.clone().requires_grad_()
        logits = view(torch.linspace(-1, 1, 16, device=device).view(2, 4, 2) @ w)
        if hook:
            logits.retain_grad()
        stats = gem_kernels.token_stats(logits, targets, inplace_backward=inplace, backend=backend)
        backward(stats, a, b)
        return w.grad, logits.grad if hook else None

    for view in (lambda x: x[:, :-1] * 1.0, lambda x: x.view(2, 2, 2, 60)[:, :, 0].repeat(1, 2, 1)[:, 1:]):
        assert_near(gradient(view, True)[0], gradient(view, False)[0], 2.0**-20)
    (got, seen), (want, _) = (gradient(lambda x: x[:, :-1], inplace, hook=True) for inplace in (True, False))
    assert_near(got, want, 2.0**-20)
    assert seen.shape == (2, 3, 60) and seen.abs().sum() > 0


@each_backend
@pytest.mark.parametrize("inplace", [False, True])
def test_outputs_can_be_changed_in_place(inplace, backend, device):
    logits, targets = make(3, 40, device=device)
    grads = []
    for change in (lambda x: x * 2.0, lambda x: x.mul_(2.0)):
        leaf = logits.clone().requires_grad_()
        stats = gem_kernels.token_stats(leaf, targets, inplace_backward=inplace, backend=backend)
        change(stats.logprobs).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_derivative_is_refused(inplace):
    """Also where the rest of a penalty has one: it must not be left out of the sum."""
    logits, targets = make(2, 20)
    x = logits.requires_grad_()
    stats = gem_kernels.token_stats(x * 1.0, targets, inplace_backward=inplace)
    with pytest.raises(RuntimeError, match="token_stats has no second derivative"):
        (g,) = torch.autograd.grad(stats.logprobs.sum(), x, create_graph=True)
        torch.autograd.grad((g**2).sum() + (x**2).sum(), x)


@pytest.mark.parametrize("inplace", [False, True])
def test_forward_mode_is_refused(inplace):
    logits, targets = make(2, 20)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        dual = forward_ad.make_dual(logits.requires_grad_(), torch.ones_like(logits))
        gem_kernels.token_stats(dual, targets, inplace_backward=inplace)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: gem_kernels.token_stats(x, targets).entropy, (logits,), (logits,))


SPAN = {"completion_mask": torch.ones(2, 3, dtype=torch.bool), "answer_start": torch.tensor([1, 2]), "group_size": 2}
OF_LOGITS = {
    "token_stats": lambda x, y: (gem_kernels.token_stats(x, y).logprobs * 2).sum(),
    "fused_entropy_score": lambda x, y: gem_kernels.fused_entropy_score(x, y, **SPAN).entropy.sum(),
    "sega_loss": lambda x, y: gem_kernels.sega_loss(x, y, **SPAN).loss,
}


@pytest.mark.parametrize("function", OF_LOGITS)
def test_torch_func_grad(function):
    logits, targets = make(2, 3, 20)
    got = torch.func.grad(OF_LOGITS[function])(logits, targets)
    leaf = logits.clone().requires_grad_()
    OF_LOGITS[function](leaf, targets).backward()
    assert torch.equal(got, leaf.grad) and got.abs().sum() > 0
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.grad(lambda x: torch.func.grad(OF_LOGITS[function])(x, targets).square().sum())(logits)


# What a call launches: with few rows that, and not the kernels, is its time.


class Launches(TorchDispatchMode):
    """Names of what computes: operators of torch, and our kernels. Our operators are entered by their Python bodies."""

    FREE = {"empty", "view", "reshape", "detach", "expand", "alias", "select", "as_strided", "to", "unsqueeze"}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        bodies = {
            f._opoverload: f._init_fn for f in vars(logit_stats).values() if isinstance(f, torch.library.CustomOpDef)
        }
        if function in bodies:
            with self:
                return bodies[function](*args, **(kwargs or {}))
        if function.overloadpacket.__name__ not in self.FREE:
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_token_stats_launches_its_kernel_and_nothing_else(monkeypatch):
    """On a GPU the targets are not looked at; four results are allocated, and written once."""
    launch = pytest.importorskip("gem_kernels.backends.triton.launch")
    seen = Launches()
    monkeypatch.setattr(logit_stats, "check_values", lambda *_: None)
    monkeypatch.setattr(launch, "row_stats_forward", lambda rows, y, options, out, extra: seen.names.append("forward"))
    monkeypatch.setattr(launch, "row_stats_backward", lambda *_: seen.names.append("backward"))
    logits, targets = make(64, 40)
    logits.requires_grad_()
    a, b = upstream(targets.shape)
    with seen:
        stats = gem_kernels.token_stats(logits, targets, backend="triton")
        torch.autograd.grad([stats.logprobs, stats.entropy], logits, [a, b])
    assert seen.names == ["forward", "backward"]
    seen.names.clear()
    tau = torch.ones(64)
    with seen:
        stats = gem_kernels.token_stats(logits, targets.int(), temperature=tau, backend="triton")
        torch.autograd.grad(stats.logprobs, logits, a)
    assert seen.names == ["_to_copy", "forward", "zeros_like", "backward"]
