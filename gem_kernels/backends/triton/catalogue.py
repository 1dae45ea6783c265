"""Every kernel with the argument types and launch options it is used with, so that it can be compiled without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ...types import EXTRA_STATS, extra_bits
from . import row_gradient, row_stats, span_scores
from .launch import MOST_REGISTERS, MOST_REGISTERS_EXTRA

STATS = dict.fromkeys(("logprob_ptr", "entropy_ptr", "max_ptr", "log_sum_ptr"), "*fp32")
ROW = {
    "targets_ptr": "*i64",
    "temperature": "fp32",
    "temperature_ptr": "*fp32",
    "softcap": "fp32",
    "V": "i32",
    "n_inner": "i32",
    "base": "i32",
    "stride_outer": "i64",
    "stride_inner": "i64",
    "ignore_index": "i32",
}
NO_EXTRA = {"WANTED": 0, "extra_ptr": None}
FEATURE_WEIGHTS = (
    "final", "fork", "reasoning", "mean", "max", "mean_logprob", "sum_logprob", "min_logprob", "length",
)  # fmt: skip


@dataclass(frozen=True)
class KernelSpec:
    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 8
    num_stages: int = 3
    maxnreg: int | None = None
    streaming: bool = False
    """Its inner loop is counted by bench.sass."""
    counted_only: bool = False
    """Its code is part of that of another one: there is no need to compile it for every target."""


def kernels() -> list[KernelSpec]:
    specs = []
    for dtype in ("bf16", "fp16", "fp32"):
        launch = row_stats.launch_options(1 << 17, 4 if dtype == "fp32" else 2)
        blocks = {"BLOCK": launch.block, "ALIGN": launch.align, "PTX": True}
        for softcap in (False, True):
            name = f"{dtype}{'_softcap' if softcap else ''}"
            variant = {"TEMPERATURE_TENSOR": softcap, "SOFTCAP": softcap}
            for split in (False, True):
                specs.append(
                    KernelSpec(
                        f"forward_{name}{'_split' if split else ''}",
                        row_stats.row_stats_forward,
                        {
                            "logits_ptr": f"*{dtype}",
                            "partial_ptr": "*fp32",
                            "span": "i32",
                            "n_splits": "i32",
                            "extra_stride": "i64",
                            **ROW,
                            **STATS,
                        },
                        {**variant, **blocks, **NO_EXTRA, "LANES": launch.lanes, "SPLIT": split},
                        launch.num_warps,
                        streaming=True,
                    )
                )
            specs.append(
                KernelSpec(
                    f"combine_{name}",
                    row_stats.row_stats_combine,
                    {
                        "logits_ptr": f"*{dtype}",
                        "partial_ptr": "*fp32",
                        "n_splits": "i32",
                        "extra_stride": "i64",
                        **ROW,
                        **STATS,
                    },
                    {**variant, **NO_EXTRA, "MAX_SPLITS": row_stats.MAX_SPLITS, "PTX": True},
                    1,
                )
            )
            specs.append(
                KernelSpec(
                    f"backward_{name}",
                    row_gradient.row_stats_backward,
                    {
                        "logits_ptr": f"*{dtype}",
                        "grad_ptr": f"*{dtype}",
                        "grad_logprob_ptr": "*fp32",
                        "grad_entropy_ptr": "*fp32",
                        "span": "i32",
                        "grad_base": "i32",
                        "grad_outer": "i64",
                        "grad_inner": "i64",
                        **ROW,
                        **{k: v for k, v in STATS.items() if k != "logprob_ptr"},
                    },
                    {**variant, **blocks, "ALIKE": True, "ORDERED": True},
                    launch.num_warps,
                    streaming=True,
                )
            )
    specs += [
        replace(spec, name=f"{spec.name}_occupancy_4", maxnreg=MOST_REGISTERS)
        for spec in specs
        if spec.name in ("forward_bf16", "forward_bf16_split", "forward_fp16", "forward_fp32")
    ]
    specs += _with_extra({spec.name: spec for spec in specs})
    apart = next(s for s in specs if s.name == "backward_bf16")
    specs.append(
        replace(
            apart,
            name="backward_bf16_apart",
            constexprs={**apart.constexprs, "ALIKE": False, "BLOCK": row_stats.apart(apart.constexprs["BLOCK"])},
        )
    )
    for packed in (False, True):
        specs.append(
            KernelSpec(
                f"span_scores_{'packed' if packed else 'padded'}",
                span_scores.span_scores,
                {
                    "entropy_ptr": "*fp32",
                    "mask_ptr": "*i8",
                    "cu_seqlens_ptr": "*i32",
                    "answer_start_ptr": "*i64",
                    "valid_ptr": "*i8",
                    "ok_ptr": "*i8",
                    "N": "i32",
                    "T": "i32",
                    "top_numerator": "i64",
                    "top_denominator": "i64",
                    **dict.fromkeys(("logprobs_ptr", "features_ptr", "score_ptr"), "*fp32"),
                    **{f"w_{name}": "fp32" for name in FEATURE_WEIGHTS},
                },
                {
                    "PACKED": packed,
                    "EXCLUDE": packed,
                    "HAS_VALID": packed,
                    "HAS_LOGPROBS": packed,
                    "BLOCK": span_scores.BLOCK,
                },
            )
        )
    for mapping, name in enumerate(("identity", "softmax", "rank")):
        specs.append(
            KernelSpec(
                f"group_advantages_{name}",
                span_scores.group_advantages,
                {
                    "advantages_ptr": "*fp32",
                    "scores_ptr": "*fp32",
                    "valid_ptr": "*i8",
                    "G": "i32",
                    "eps": "fp32",
                },
                {"MAPPING": mapping, "SCALE": True, "HAS_VALID": True, "BLOCK": 16},
                num_warps=1,
            )
        )
    return specs


def _with_extra(specs: dict[str, KernelSpec]) -> list[KernelSpec]:
    """The forward pass with each of the optional statistics alone, and with all of them."""

    def plain(spec: KernelSpec) -> dict[str, Any]:
        return {name: value for name, value in spec.constexprs.items() if name not in NO_EXTRA}

    forms = [name for name in specs if name.startswith(("forward", "combine")) and "occupancy" not in name]
    forms = [name for name in forms if "softcap_split" not in name and (name.startswith("forward") or "bf16" in name)]
    wanted = {f"forward_bf16_{name}": ("forward_bf16", (name,)) for name in EXTRA_STATS}
    wanted |= {f"{name}_extra": (name, EXTRA_STATS) for name in forms}
    return [
        replace(
            specs[base],
            name=name,
            signature={**specs[base].signature, "extra_ptr": "*fp32"},
            constexprs={**plain(specs[base]), "WANTED": extra_bits(of)},
            maxnreg=MOST_REGISTERS_EXTRA if "fp32" in name else None,
            counted_only=len(of) == 1,
        )
        for name, (base, of) in wanted.items()
    ]
