"""Checks of the public functions' arguments: one ValueError that names the argument, what was expected and what came.

Shapes, dtypes, devices and Python values are checked always. Values inside tensors are checked inside the operators,
on the CPU only: on a GPU a look would wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NoReturn

import torch
from torch import Tensor

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("auto", "triton", "torch")
GPU = ("cuda", "meta")
"""Device types that take a GPU's way. Meta tensors stand for a GPU where there is none: tests and
`python -m bench.counts` count products, passes and allocations with them."""


def not_compiled(function):
    """torch.compile runs `function` eagerly. torch.compiler.disable does so too, but imports the compiler."""
    function._torchdynamo_disable = True
    return function


def fail(name: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"`{name}` must be {expected}, got {got}")


def on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type in GPU


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that waits for nothing: a GPU fetches it from pinned memory."""
    if tensor.device == device:
        return tensor
    if tensor.device.type == "cpu" and device.type in GPU:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def check_tensor(
    name: str,
    value: Any,
    *,
    shape: Sequence[int] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> None:
    if not isinstance(value, Tensor):
        fail(name, "a tensor", type(value).__name__)
    if shape is not None and tuple(value.shape) != tuple(shape):
        fail(name, f"of shape {tuple(shape)}", tuple(value.shape))
    if dtypes is not None and value.dtype not in dtypes:
        fail(name, f"of dtype {' or '.join(str(d) for d in dtypes)}", value.dtype)
    if device is not None and value.device != device:
        fail(name, f"on {device}, like the other tensors", value.device)


def check_floating(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        fail(name, "a floating-point tensor", getattr(value, "dtype", type(value).__name__))


def shown(value: Any) -> str:
    """Its repr, on one line of bounded length."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + " ..."


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        fail(name, f"one of {', '.join(map(repr, choices))}", repr(value))


def check_number(name: str, value: Any, *, above: float = -math.inf) -> None:
    """A finite Python number, greater than `above`."""
    try:
        fine = (
            not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value) and value > above
        )
    except OverflowError:  # an integer that is no float
        fine = False
    if not fine:
        fail(name, "a finite number" + (f" above {above:g}" if above > -math.inf else ""), shown(value))


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**63:
        fail(name, "an integer of at least 1" + (" and below 2**63" if isinstance(value, int) else ""), shown(value))


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        fail(name, "True or False", repr(value))


def check_ignore_index(ignore_index: Any, targets: Any) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        fail("ignore_index", "an integer", repr(ignore_index))
    if isinstance(targets, Tensor) and targets.dtype in (torch.int32, torch.int64):
        info = torch.iinfo(targets.dtype)
        if not info.min <= ignore_index <= info.max:
            fail("ignore_index", f"a number that {info.dtype} targets can hold", shown(ignore_index))


def check_logits(logits: Any, targets: Any) -> None:
    check_tensor("logits", logits, dtypes=LOGIT_DTYPES)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        fail("logits", "of shape [..., V] with V at least 1", tuple(logits.shape))
    check_tensor("targets", targets, dtypes=(torch.int64, torch.int32), device=logits.device)
    if targets.shape != logits.shape[:-1]:
        fail(
            "targets",
            f"of shape {tuple(logits.shape[:-1])} (that of `logits` less its last axis)",
            tuple(targets.shape),
        )


def check_temperature(temperature: Any, shape: torch.Size, device: torch.device) -> tuple[float, Tensor | None]:
    """-> (the number, None) or (1.0, one float32 per row)."""
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature, above=0.0)
        return float(temperature), None
    if not temperature.is_floating_point():
        fail("temperature", "a float or a floating-point tensor", temperature.dtype)
    if temperature.requires_grad:
        fail("temperature", "without requires_grad (no gradient reaches it; detach it)", "requires_grad=True")
    if temperature.dim() == 0 and temperature.device.type == "cpu" != device.type and not torch.compiler.is_compiling():
        number = float(temperature)  # known here; a copy to the device would wait for it
        check_number("temperature", number, above=0.0)
        return number, None
    if temperature.device != device and temperature.dim() > 0:
        fail("temperature", f"on {device}, like the other tensors", temperature.device)
    try:
        rows = temperature.to(device=device, dtype=torch.float32).expand(shape)
    except RuntimeError:
        fail("temperature", f"broadcastable to the shape of `targets`, {tuple(shape)}", tuple(temperature.shape))
    return 1.0, rows.reshape(-1).contiguous()


def check_softcap(softcap: Any) -> float | None:
    if softcap is None:
        return None
    check_number("softcap", softcap, above=0.0)
    return float(softcap)


def check_backend(backend: Any, device: torch.device) -> str:
    """ "auto" -> "triton" on a GPU, "cpu" (compiled code where a compiler is found) elsewhere. Others: themselves."""
    check_choice("backend", backend, BACKENDS)
    if backend == "auto":
        return "triton" if device.type in GPU else "cpu"
    if backend == "triton" and device.type not in GPU and not _interpreting():
        fail("backend", "'auto' or 'torch' for tensors on the CPU (Triton there needs TRITON_INTERPRET=1)", "'triton'")
    return backend


def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def top_fraction(top_m: Any) -> tuple[int, int]:
    """`top_m` as (numerator, denominator): m = numerator * n // denominator; denominator 0 for a count.

    A float is taken as the decimal it is written as, so 0.29 of 100 is 29 everywhere (29/100 in binary is below 0.29).
    """
    if isinstance(top_m, int) and not isinstance(top_m, bool):
        if not 1 <= top_m < 2**63:
            fail("top_m", "a share in (0, 1] (float) or a count of at least 1 and below 2**63 (int)", shown(top_m))
        return top_m, 0
    if not isinstance(top_m, float) or not 0.0 < top_m <= 1.0:
        fail("top_m", "a share in (0, 1] (float) or a count of at least 1 (int)", repr(top_m))
    share = Fraction(str(top_m)).limit_denominator(10**9)
    return max(share.numerator, 0), share.denominator


def check_layout(tokens: Tensor, name: str, completion_mask: Any, cu_seqlens: Any) -> int:
    """Exactly one of the two layouts, fitting `tokens` ([B, T] or [N], called `name`) -> B."""
    if (completion_mask is None) == (cu_seqlens is None):
        fail("completion_mask", "given, or `cu_seqlens`, and not both", "neither" if cu_seqlens is None else "both")
    if completion_mask is not None:
        if tokens.dim() != 2:
            fail(name, "of shape [B, T] with `completion_mask`", tuple(tokens.shape))
        check_tensor("completion_mask", completion_mask, shape=tokens.shape, dtypes=(torch.bool,), device=tokens.device)
        return tokens.shape[0]
    if tokens.dim() != 1:
        fail(name, "of shape [N] with `cu_seqlens`", tuple(tokens.shape))
    check_tensor("cu_seqlens", cu_seqlens, dtypes=(torch.int32, torch.int64), device=tokens.device)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        fail("cu_seqlens", "of shape [B + 1]", tuple(cu_seqlens.shape))
    return cu_seqlens.shape[0] - 1
