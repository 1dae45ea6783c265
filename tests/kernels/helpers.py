"""Truth in float64 and the error budget, for the tests of gem_kernels.

Truth is `gem_kernels.reference` on float64 copies of the very inputs (a bf16 logit is exact in float64), gradients
by autograd. Budget: a kernel may err twice as much as eager torch does on the same numbers in float32 (the upcast
that trainers do), plus rounding of the result to its dtype and two float32 roundings at the size of the row, without
which a torch result that happens to be exact would leave no room at all, plus 2^-50 for the truth's own rounding. A
softcapped logit is c tanh, which kernels compute from one exponential, to five float32 roundings of c: over the
temperature that is a relative error of every probability (`slack`). The target's gradient (a - a p) / temperature is
rounded at the size of what it is the difference of (`terms`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gem_kernels
from gem_kernels import arguments, reference
from gem_kernels.backends.types import RowStats
from gem_kernels.linear.head import row_stride

IGNORE = -100
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = list(EPS)
BACKENDS = ["triton", "torch"] if torch.cuda.is_available() else ["triton", "torch", "auto"]


def assert_near(got: Tensor, want: Tensor, relative: float = 2.0**-16, what: str = "", floor: float = 0.0) -> None:
    """|got - want| <= relative * the largest |want| (or `floor`), and NaN and infinities in the same places.

    Of two computations of the same numbers. What sums in another order differ by is a share of the numbers that were
    added, which a small entry no longer shows; so the scale is the whole tensor's, and the bound holds on any
    processor. `floor`: the smallest scale, where a tensor is zero but for rounding.
    """
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{what}: {got.dtype}, expected {want.dtype}"
    if want.numel() == 0:
        return
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    special = ~want.isfinite() | ~got.isfinite()
    same = (got == want) | (got.isnan() & want.isnan())
    assert bool(same[special].all()), f"{what}: NaN or infinity in one alone"
    error = torch.where(special, 0.0, got - want).abs().max()
    scale = torch.where(special, 0.0, want).abs().max().clamp(min=floor)
    assert error <= relative * scale, f"{what}: error {error:.3g}, allowed {relative:.2g} of {scale:.3g}"


def make(*shape: int, dtype=torch.float32, scale: float = 3.0, seed: int = 0, device="cpu") -> tuple[Tensor, Tensor]:
    """Logits of this shape (the last number is V), and targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*shape, generator=generator) * scale).to(dtype)
    targets = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    return logits.to(device), targets.to(device)


def empty_stats(n: int, device="cpu") -> RowStats:
    return RowStats(*(torch.full((n,), torch.nan, dtype=torch.float32, device=device) for _ in range(4)))


def upstream(shape, use: str = "both", seed: int = 1, device="cpu") -> tuple[Tensor | None, Tensor | None]:
    """dL/dlogprobs and dL/dentropy; one of them None with use="logprobs" or "entropy"."""
    a, b = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)).to(device).unbind()
    return (a if use != "entropy" else None), (b if use != "logprobs" else None)


def backward(stats, a: Tensor | None, b: Tensor | None, **options) -> None:
    pairs = [(x, g) for x, g in ((stats.logprobs, a), (stats.entropy, b)) if g is not None]
    torch.autograd.backward([x for x, _ in pairs], [g.to(x.dtype) for x, g in pairs], **options)


def reference_stats(logits, targets, a, b, dtype, **arguments) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, gradient) of the reference computed in `dtype`."""
    z = logits.detach().to(dtype).contiguous().requires_grad_()
    if isinstance(arguments.get("temperature"), Tensor):
        arguments["temperature"] = arguments["temperature"].to(dtype)
    stats = reference.token_stats(z, targets, **arguments)
    backward(stats, a, b)
    return stats.logprobs.detach(), stats.entropy.detach(), z.grad


def assert_within_budget(
    got: Tensor, exact: Tensor, torchs: Tensor, what: str, rowwise=False, slack=0.0, terms=0.0, nats=0.0
) -> None:
    """|got - exact| <= 2 |torch - exact| (worst of the row, or of all) + rounding; NaN and inf where truth has them."""
    eps = EPS[got.dtype]
    assert got.shape == exact.shape, what
    if got.numel() == 0:
        return
    got, torchs, exact = got.detach().double(), torchs.detach().double(), exact.detach()
    special = ~exact.isfinite()
    torch.testing.assert_close(
        got[special], exact[special], rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )
    error, torch_error, size = (
        torch.where(special, torch.zeros_like(exact), x)
        for x in ((got - exact).abs(), (torchs - exact).abs(), exact.abs())
    )
    if rowwise:
        torch_error, scale = torch_error.amax(-1, keepdim=True), size.amax(-1, keepdim=True)
    else:
        torch_error, scale = torch_error.max(), size.max()
    scale = scale.clamp(min=torch.as_tensor(terms, dtype=scale.dtype, device=scale.device))
    smallest = 2.0**-25 if eps == EPS[torch.float16] else 2.0**-50  # half a subnormal
    allowed = 2 * torch_error + 2 * eps * size + (2.0**-22 + slack) * scale + nats + smallest
    worst = (error / allowed).max()
    assert worst <= 1, f"{what}: error {error.max():.3g} is {worst:.2f} times the budget"


def check(logits: Tensor, targets: Tensor, *, backend: str, use: str = "both", inplace_backward=False, **arguments):
    """token_stats against float64, values and gradient. -> the result and the logits with their gradient."""
    a, b = upstream(targets.shape, use, device=logits.device)
    exact = reference_stats(logits, targets, a, b, torch.float64, **dict(arguments))
    torchs = reference_stats(logits, targets, a, b, torch.float32, **dict(arguments))
    logits = logits.detach().requires_grad_()
    before = logits.detach().clone()
    stats = gem_kernels.token_stats(logits, targets, backend=backend, inplace_backward=inplace_backward, **arguments)
    assert torch.equal(logits.detach().nan_to_num(7.0), before.nan_to_num(7.0)), "forward changed the logits"
    assert stats.logprobs.dtype == stats.entropy.dtype == torch.float32
    tau = torch.as_tensor(arguments.get("temperature", 1.0)).double()
    slack = 5 * 2.0**-23 * arguments["softcap"] / float(tau.min()) if arguments.get("softcap") else 0.0
    # A relative error of a probability is an absolute one of its logarithm, in nats, and of the mean of these.
    assert_within_budget(stats.logprobs, exact[0], torchs[0], "logprobs", nats=slack)
    assert_within_budget(stats.entropy, exact[1], torchs[1], "entropy", nats=slack)
    backward(stats, a, b)
    terms = (
        0.0
        if a is None
        else (a.abs() / tau.to(a.device)).where(targets != arguments.get("ignore_index", IGNORE), 0.0)[..., None]
    )
    assert logits.grad.dtype == logits.dtype
    assert_within_budget(
        logits.grad, exact[2], torchs[2].to(logits.dtype), "gradient", rowwise=True, slack=slack, terms=terms
    )
    return stats, logits


# Linear heads. Budget of a result: twice the error (relative, L2) of eager torch in the dtype of the inputs, plus a
# rounding.

ROUNDING = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
CPU = torch.device("cpu")
LINEAR_BACKENDS = ["auto", "torch", "triton"]
LEAVES = ("hidden", "weight", "bias")


def needs_backend(backend: str, device: torch.device) -> None:
    if backend == "triton" and device.type != "cuda" and not arguments._interpreting():
        pytest.skip("Triton on the CPU needs its interpreter")


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    options: dict
    """softcap, temperature, logit_scale"""

    def leaves(self, dtype=None) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in LEAVES}
        return {k: v.detach().to(dtype or v.dtype).clone().requires_grad_() for k, v in named.items() if v is not None}

    def eager(self, dtype, hidden, weight, bias=None) -> tuple[Tensor, dict]:
        """The full logits as a model makes them, and the arguments of the row functions. Float64 is the truth."""
        options = dict(self.options)
        product = hidden @ weight.t()
        if bias is not None:
            product = product + bias
        logits = (options.pop("logit_scale", 1.0) * product).to(dtype)
        if isinstance(options.get("temperature"), Tensor):
            options["temperature"] = options["temperature"].to(dtype)
        return logits, options


def problem(*shape, V=257, D=33, dtype=torch.float32, device=CPU, bias=True, ignored=0.2, seed=0, **options) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, D, generator=generator).to(dtype)
    weight = (torch.randn(V, D, generator=generator) * (3 / math.sqrt(D))).to(dtype)
    b = torch.randn(V, generator=generator).to(dtype) if bias else None
    targets = torch.randint(0, V, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < ignored] = IGNORE
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    return Problem(hidden.to(device), weight.to(device), b if b is None else b.to(device), targets.to(device), options)


def distance(x: Tensor, exact: Tensor, size: float = 0.0) -> float:
    """L2, relative to `exact`, or to `size` where that is more."""
    x, exact = x.detach().double(), exact.detach().double()
    return float((x - exact).norm() / exact.norm().clamp(min=max(size, 1e-30))) if exact.numel() else 0.0


def assert_all_within_budget(
    ours: dict, eager: dict, truth: dict, dtype: torch.dtype, *, sizes: dict | None = None, condition: float = 1.0
) -> None:
    """sizes: of a result that is a sum, what its terms add up to without their signs; where it cancels, its rounding
    is a share of that. condition: how much larger than the rounding of what they are made of the error of a result is
    (differences of near numbers); eager torch suffers from it too, but may be lucky."""
    assert ours.keys() == eager.keys() == truth.keys()
    for name, exact in truth.items():
        assert ours[name].shape == exact.shape, name
        assert exact.isfinite().all(), f"{name}: the truth is not finite"
        size = (sizes or {}).get(name, 0.0)
        # A loss is a long sum: a few roundings more.
        rounding = ROUNDING[dtype] * condition * (8 if name == "loss" else 1)
        error, budget = distance(ours[name], exact, size), 2 * distance(eager[name], exact, size) + rounding
        if not exact.detach().any():
            assert float(ours[name].detach().abs().sum()) == 0.0, name
        else:
            assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


def stats_and_gradients(stats, leaves: dict, shape) -> dict:
    """Values, and the gradients of a loss that weighs each log-prob and entropy at random."""
    a, b = torch.randn(2, *shape, generator=torch.Generator().manual_seed(9)).to(stats.logprobs)
    (a * stats.logprobs + b * stats.entropy).sum().backward()
    return {"logprobs": stats.logprobs, "entropy": stats.entropy, **{k: v.grad for k, v in leaves.items()}}


def check_stats(p: Problem, **options) -> dict:
    dtype = p.hidden.dtype
    leaves = p.leaves()
    stats = gem_kernels.linear_token_stats(targets=p.targets, **leaves, **p.options, **options)
    assert stats.logprobs.dtype == stats.entropy.dtype == torch.float32
    ours = stats_and_gradients(stats, leaves, p.targets.shape)
    assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves.values())
    others = []
    for kind in (dtype, torch.float64):
        leaves = p.leaves(kind)
        logits, arguments_ = p.eager(torch.float32 if kind != torch.float64 else kind, **leaves)
        stats = reference.token_stats(logits, p.targets, **arguments_)
        others.append(stats_and_gradients(stats, leaves, p.targets.shape))
    assert_all_within_budget(ours, *others, dtype)
    return ours


def sequences(device, V=203, D=16, dtype=torch.float32, seed=0, **options):
    """Six sequences in two groups, with holes, an empty one, answers found and not -> padded and packed form."""
    p = problem(6, 17, V=V, D=D, dtype=dtype, ignored=0.0, seed=seed, **options)  # ignored: one token, below
    mask = torch.rand(6, 17, generator=torch.Generator().manual_seed(seed)) > 0.2
    mask[3] = False
    p.targets[0, 4] = IGNORE
    lengths = mask.sum(1)
    flat = Problem(p.hidden[mask], p.weight, p.bias, p.targets[mask], {})
    layouts = []
    for q, layout in (
        (p, {"completion_mask": mask}),
        (flat, {"cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()}),
    ):
        moved = (None if x is None else x.to(device) for x in (q.hidden, q.weight, q.bias, q.targets))
        span = {"answer_start": torch.tensor([12, 5, 99, 3, -1, 0]), "group_size": 3, "top_m": 0.3}
        layout = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in {**layout, **span}.items()}
        layouts.append((Problem(*moved, p.options), layout))
    return layouts


class Recorder(TorchDispatchMode):
    """Bytes of each storage made, and matrix products."""

    def __init__(self):
        super().__init__()
        self.made, self.products = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        self.products += name in ("mm", "addmm", "addmm_", "bmm", "matmul", "addmv", "mv", "_scaled_mm")
        leaves = torch.utils._pytree.tree_leaves
        held = {x.untyped_storage().data_ptr() for x in leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = function(*args, **kwargs)
        for x in leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in held:
                self.made.append((x.untyped_storage().nbytes(), name, tuple(x.shape)))
        return out


def room(V: int, rows: int, dtype: torch.dtype = torch.float32) -> int:
    """workspace_bytes for chunks of so many rows."""
    return row_stride(V) * rows * dtype.itemsize


def policy(logprobs, entropy):
    return -(logprobs.clamp(min=-7.0) + 0.1 * entropy).sum()


def paths(p: Problem, leaves: dict, workspace_bytes: int):
    """Name -> a function that makes loss and gradients of all the public paths. One group of all rows, packed."""
    N = p.targets.shape[0]
    span = {
        "cu_seqlens": torch.tensor([0, N // 3, N], dtype=torch.int32, device=p.targets.device),
        "answer_start": torch.tensor([1, 2], device=p.targets.device),
        "group_size": 2,
    }
    common = {"targets": p.targets, "workspace_bytes": workspace_bytes, **leaves}

    def run_sega(path, **options):
        out = gem_kernels.fused_linear_sega_loss(**common, **span, **options)
        weighs_later = leaves["hidden"].requires_grad and not any(
            leaves[name].requires_grad for name in ("weight", "bias") if name in leaves
        )
        assert out.path == ("one_shot" if weighs_later and torch.is_grad_enabled() else path)
        return out.loss

    def run_stats():
        stats = gem_kernels.linear_token_stats(**common)
        return policy(stats.logprobs, stats.entropy)

    def run_score():
        out = gem_kernels.fused_linear_entropy_score(**common, **span)
        return (out.logprobs + out.entropy).sum()

    return {
        "stats": run_stats,
        "score": run_score,
        "sega, given advantages": lambda: run_sega("one_shot", advantages=torch.ones(2, device=p.targets.device)),
        "sega, two phase": lambda: run_sega("two_phase"),
        "policy": lambda: gem_kernels.fused_linear_policy_loss(token_loss=policy, **common).loss,
    }


SPAN = {"cu_seqlens": torch.tensor([0, 1, 3]), "answer_start": torch.tensor([0, 1]), "group_size": 2}


def good() -> dict:
    return {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "targets": torch.tensor([0, 1, 2])}
