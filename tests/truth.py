"""Truth in float64 and the error budget, for the tests of gem_kernels.

Truth is `gem_kernels.reference` on float64 copies of the very inputs (a bf16 logit is exact in float64), gradients
by autograd. Budget: a kernel may err twice as much as eager torch does on the same numbers in float32 (the upcast
that trainers do), plus rounding of the result to its dtype and two float32 roundings at the size of the row, without
which a torch result that happens to be exact would leave no room at all, plus 2^-50 for the truth's own rounding. A
softcapped logit is c tanh, which kernels compute from one exponential, to two float32 roundings of c: over the
temperature that is a relative error of every probability (`slack`). The target's gradient (a - a p) / temperature is
rounded at the size of what it is the difference of (`terms`).
"""

from __future__ import annotations

import torch
from torch import Tensor

import gem_kernels
from gem_kernels import reference

IGNORE = -100
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = list(EPS)
BACKENDS = ["triton", "torch"] if torch.cuda.is_available() else ["triton", "torch", "auto"]


def make(*shape: int, dtype=torch.float32, scale: float = 3.0, seed: int = 0, device="cpu") -> tuple[Tensor, Tensor]:
    """Logits of this shape (the last number is V), and targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*shape, generator=generator) * scale).to(dtype)
    targets = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    return logits.to(device), targets.to(device)


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
    got: Tensor, exact: Tensor, torchs: Tensor, what: str, rowwise=False, slack=0.0, terms=0.0
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
    allowed = 2 * torch_error + 2 * eps * size + (2.0**-22 + slack) * scale + smallest
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
    assert_within_budget(stats.logprobs, exact[0], torchs[0], "logprobs")
    assert_within_budget(stats.entropy, exact[1], torchs[1], "entropy")
    backward(stats, a, b)
    tau = torch.as_tensor(arguments.get("temperature", 1.0)).double()
    slack = 2.0**-22 * arguments["softcap"] / float(tau.min()) if arguments.get("softcap") else 0.0
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
