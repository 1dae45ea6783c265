"""Checks of the public functions' arguments: one ValueError that names the argument, what was expected and what came.

Shapes, dtypes, devices and Python values are checked always. Values inside tensors are checked inside the operators,
on the CPU only: on a GPU a look would wait for the device.
"""

from __future__ import annotations

import difflib
import functools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor

from .types import EXTRA_STATS, FLOAT32_MAX

FLOAT32_TINY = 2.0**-126
"""The smallest number of float32 that has all digits."""
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
F = TypeVar("F", bound=Callable[..., Any])
BACKENDS = ("auto", "triton", "torch")
GPU = ("cuda", "meta")
"""Device types that take a GPU's way. Meta tensors stand for a GPU where there is none: tests and
`python -m bench.counts` count products, passes and allocations with them."""


def not_compiled(function: F) -> F:
    """torch.compile runs `function`, and all that it calls, eagerly: one graph break in the caller.

    That is torch.compiler.disable, which imports the compiler; so it waits for a call after someone else did.
    """
    disabled: Any = None

    @functools.wraps(function)
    def eager(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    eager._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast(F, eager)


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
    """A Python number that float32, in which kernels take it, has too; greater than `above`."""
    fine = not isinstance(value, bool) and isinstance(value, (int, float))
    if not (fine and abs(value) <= FLOAT32_MAX and (value > above if above != 0.0 else value >= FLOAT32_TINY)):
        bound = f" above {above:g}" if above > -math.inf else ""
        fail(name, f"a finite number{bound}, within float32's range", shown(value))


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
        if torch.compiler.is_compiling():  # a number among an operator's arguments would be compiled in
            return 1.0, (torch.ones(shape, dtype=torch.float32, device=device) * temperature).reshape(-1)
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


def check_extra(extra: Any) -> tuple[str, ...]:
    """Names of EXTRA_STATS, in their order, each once."""
    names = tuple(extra) if isinstance(extra, Iterable) and not isinstance(extra, (str, Tensor)) else (None,)
    if not all(isinstance(name, str) for name in names):
        fail("extra", f"a sequence of names, such as ({EXTRA_STATS[0]!r},)", shown(extra))
    for name in names:
        if name not in EXTRA_STATS:
            near = difflib.get_close_matches(name, EXTRA_STATS, 3, 0.5)
            meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            fail("extra", f"names among {', '.join(map(repr, EXTRA_STATS))}", shown(name) + meant)
    return tuple(name for name in EXTRA_STATS if name in names)


def check_top_m(top_m: Any) -> None:
    if isinstance(top_m, int) and not isinstance(top_m, bool):
        if not 1 <= top_m < 2**63:
            fail("top_m", "a share in (0, 1] (float) or a count of at least 1 and below 2**63 (int)", shown(top_m))
    elif not isinstance(top_m, float) or not 0.0 < top_m <= 1.0:
        fail("top_m", "a share in (0, 1] (float) or a count of at least 1 (int)", repr(top_m))


def top_fraction(top_m: Any) -> tuple[int, int]:
    """`top_m` as (numerator, denominator): m = numerator * n // denominator; denominator 0 for a count.

    The one place that says what a share is: the fraction nearest to the decimal it is written as, of those with a
    denominator up to 10^9 (so numerator * n fits int64). 0.29 of 100 is 29, and 1/3 of 6 is 2, as binary fractions
    below 0.29 and 1/3 would not give.
    """
    check_top_m(top_m)
    if isinstance(top_m, int):
        return top_m, 0
    share = Fraction(str(top_m)).limit_denominator(10**9)
    return max(share.numerator, 0), share.denominator


def as_mask(name: str, mask: Any) -> Any:
    """Integers 0 and 1 as booleans; booleans, and None, as they are."""
    if not isinstance(mask, Tensor) or mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point() or mask.is_complex():
        fail(name, "of booleans, or of integers 0 and 1", mask.dtype)
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(((mask != 0) & (mask != 1)).any()):
        fail(name, "of booleans, or of integers 0 and 1", f"integers from {int(mask.min())} to {int(mask.max())}")
    return mask != 0


def check_groups(group_size: Any, group_ids: Any, B: int, device: torch.device) -> None:
    """Exactly one of the two ways to name the groups of B sequences."""
    if group_ids is not None:
        check_tensor("group_ids", group_ids, shape=(B,), dtypes=(torch.int64, torch.int32), device=device)
        if group_size is not None:
            fail("group_size", "left out where `group_ids` is given", group_size)
        return
    check_count("group_size", group_size)
    if B % group_size:
        fail("group_size", f"a divisor of the number of sequences, {B}", group_size)


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


def check_offsets(cu_seqlens: Tensor, N: int) -> None:
    """The values, on the CPU only."""
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        steps = cu_seqlens[1:] - cu_seqlens[:-1]
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != N or bool((steps < 0).any()):
            fail("cu_seqlens", f"non-decreasing from 0 to N = {N}", cu_seqlens.tolist())
