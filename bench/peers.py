"""One adapter per implementation: how it is called, what it computes, and why it is missing where it is.

    logits adapters    (logits [N, V], targets [N], temperature) -> (logprobs [N], entropy [N] or None)
    head adapters      (hidden [N, D], weight [V, D], targets [N], temperature) -> the same

`load(device)` imports the package and returns such a function, or raises `Missing` with the reason. Those that have
run on no GPU yet are written from the sources of the versions in docs/benchmarks.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import gem_kernels

from .measure import version

OURS = "gem_kernels"
TRL_CHUNK = 32768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE, the width its trainers use


class Missing(Exception):
    """Why an implementation does not take part."""


@dataclass(frozen=True)
class Adapter:
    name: str
    load: Callable[[torch.device], Callable]
    entropy: bool = True
    """False: log-probs alone. It does less than the work asks for, is labelled so and not ranked."""
    row_temperature: bool = True
    """Takes one temperature a row."""
    full_logits: bool = False
    """Holds tensors of the size of the logits."""
    approximate: bool = False
    """Leaves out part of the gradient by design: its error is printed, and it is not ranked."""
    in_place: bool = False
    """Its backward writes over the logits, so it is given its own copy (untimed)."""
    label: str = ""

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)


def package(module: str, distribution: str, device: torch.device, cuda: str = "") -> object:
    """Imports `module`, or raises Missing; `cuda` says why it cannot run without a CUDA device."""
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a package may break at import in any way
        if version(distribution) is None:
            raise Missing(f"{distribution} is not installed") from None
        line = " ".join(str(error).split())[:150]
        raise Missing(f"{distribution} {version(distribution)} does not import: {line}") from None
    if cuda and device.type != "cuda":
        raise Missing(f"needs a CUDA device ({cuda})")
    return found


def compiled(function: Callable) -> Callable[[torch.device], Callable]:
    def load(_: torch.device) -> Callable:
        return torch.compile(function, dynamic=True)

    return load


def scaled(logits: Tensor, temperature: float | Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        return logits / temperature[:, None]
    return logits if temperature == 1.0 else logits / temperature


# ---- from logits


def eager(logits, targets, temperature):
    """What trainers write: everything in float32, a tensor of the logits' size for each step."""
    logits = scaled(logits.float(), temperature)
    logp = torch.log_softmax(logits, -1)
    entropy = -(torch.softmax(logits, -1) * logp).sum(-1)
    return logp.gather(-1, targets[:, None])[:, 0], entropy


def ours_logits(logits, targets, temperature, **options):
    stats = gem_kernels.token_stats(logits, targets, temperature=temperature, **options)
    return stats.logprobs, stats.entropy


def ours_in_place(logits, targets, temperature):
    return ours_logits(logits, targets, temperature, inplace_backward=True)


def trl_helpers(device):
    trl = package("trl.trainer.utils", "trl", device)

    def call(logits, targets, temperature):
        return trl.selective_log_softmax(logits, targets, temperature=temperature), trl.entropy_from_logits(
            scaled(logits, temperature)
        )

    return call


def trl_fused(device):
    trl = package("trl.trainer.utils", "trl", device, "its Triton kernel; on a CPU it is the two helpers")
    return lambda logits, targets, temperature: trl.selective_log_softmax_and_entropy(
        logits, targets, temperature=temperature
    )


def flash_attn(device):
    flash = package("flash_attn.ops.triton.cross_entropy", "flash-attn", device, "Triton")
    return lambda logits, targets, temperature: (
        -flash.cross_entropy_loss(logits, targets, logit_scale=1 / temperature)[0],
        None,
    )


def quack_logits(device):
    quack = package("quack.cross_entropy", "quack-kernels", device, "CuTe")
    return lambda logits, targets, temperature: (
        -quack.cross_entropy(scaled(logits, temperature), targets, reduction="none"),
        None,
    )


LOGITS = (
    Adapter("eager", lambda _: eager, full_logits=True),
    Adapter("torch.compile", compiled(eager), full_logits=True),
    Adapter("TRL helpers", trl_helpers, row_temperature=False, label="two calls, in the dtype of the logits"),
    Adapter("TRL fused", trl_fused, row_temperature=False),
    Adapter("flash-attn", flash_attn, entropy=False, row_temperature=False),
    Adapter("quack", quack_logits, entropy=False),
    Adapter(OURS, lambda _: ours_logits),
    Adapter(f"{OURS} in place", lambda _: ours_in_place, in_place=True, label="gradient written over the logits"),
)


# ---- from hidden states


def eager_head(hidden, weight, targets, temperature):
    return eager(hidden @ weight.t(), targets, temperature)


def ours_head(hidden, weight, targets, temperature):
    stats = gem_kernels.linear_token_stats(hidden, weight, targets, temperature=temperature)
    return stats.logprobs, stats.entropy


def trl_chunked(device):
    trl = package("trl.kernels", "trl", device)
    return lambda hidden, weight, targets, temperature: trl.ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, temperature, TRL_CHUNK, None, 1.0, ("entropy",)
    )[:2]


def liger_scaled(device):
    liger = package("liger_kernel.ops.fused_linear_scaled_cross_entropy", "liger-kernel", device)

    def call(hidden, weight, targets, temperature):
        function = liger.LigerFusedLinearScaledCrossEntropyFunction
        nll, entropy = function.apply(hidden, weight, targets, temperature, -100, 1, True)
        return -nll, entropy

    return call


def verl_torch(device):
    verl = package("verl.utils.experimental.torch_functional", "verl", device)
    return lambda hidden, weight, targets, temperature: verl.FusedLinearForPPO()(hidden, weight, targets, temperature)


def verl_triton(device):
    verl = package("verl.utils.kernel.linear_cross_entropy", "verl", device, "Triton")
    return lambda hidden, weight, targets, temperature: verl.linear_cross_entropy(
        hidden, weight, targets, temperature, "none"
    )


def torch_linear_ce(options: bool) -> Callable[[torch.device], Callable]:
    def load(_):
        if not hasattr(F, "linear_cross_entropy"):
            raise Missing(f"torch {torch.__version__} has no F.linear_cross_entropy")
        chosen = torch.nn.LinearCrossEntropyOptions() if options else None

        def call(hidden, weight, targets, temperature):
            nll = F.linear_cross_entropy(scaled(hidden, temperature), weight, targets, reduction="none", options=chosen)
            return -nll, None

        return call

    return load


def cut_cross_entropy(cuda: str, **options) -> Callable[[torch.device], Callable]:
    def load(device):
        cce = package("cut_cross_entropy", "cut-cross-entropy", device, cuda)
        return lambda hidden, weight, targets, temperature: (
            -cce.linear_cross_entropy(scaled(hidden, temperature), weight, targets, reduction="none", **options),
            None,
        )

    return load


HEAD = (
    Adapter("eager", lambda _: eager_head, full_logits=True),
    Adapter("torch.compile", compiled(eager_head), full_logits=True),
    Adapter("TRL chunked head", trl_chunked, row_temperature=False),
    Adapter("Liger scaled CE", liger_scaled, row_temperature=False),
    Adapter("verl FusedLinearForPPO", verl_torch, row_temperature=False),
    Adapter("verl Triton", verl_triton, row_temperature=False),
    Adapter("F.linear_cross_entropy", torch_linear_ce(False), entropy=False, full_logits=True),
    Adapter("F.linear_cross_entropy chunked", torch_linear_ce(True), entropy=False),
    Adapter("CCE", cut_cross_entropy("Triton"), entropy=False, label="drops gradients below its threshold"),
    Adapter("CCE exact", cut_cross_entropy("Triton", filter_eps=None), entropy=False),
    Adapter("CCE torch_compile", cut_cross_entropy("", impl="torch_compile"), entropy=False, full_logits=True),
    Adapter(OURS, lambda _: ours_head),
)


# ---- plain cross entropy from hidden states, as the mean over rows


def liger_flce(device):
    liger = package("liger_kernel.transformers.functional", "liger-kernel", device, "Triton")
    return lambda hidden, weight, targets: liger.liger_fused_linear_cross_entropy(hidden, weight, targets)


def quack_flce(device):
    quack = package("quack.linear_cross_entropy", "quack-kernels", device, "CuTe")
    return lambda hidden, weight, targets: quack.chunked_linear_cross_entropy(hidden, weight, targets)


def ours_nll(hidden, weight, targets):
    rows = len(targets)
    return gem_kernels.fused_linear_policy_loss(
        hidden, weight, targets, lambda logprobs, entropy: -logprobs.sum() / rows
    ).loss


MEAN_NLL = (
    Adapter("Liger fused linear CE", liger_flce, entropy=False),
    Adapter("quack linear CE", quack_flce, entropy=False),
    Adapter(f"{OURS} one shot", lambda _: ours_nll),
)
