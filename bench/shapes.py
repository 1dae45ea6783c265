"""Which heads, how many rows, on which device: the one table that every benchmark takes its shapes from."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Head:
    """The output layer of a real model: V words, D hidden units."""

    name: str
    vocab: int
    hidden: int


SMOLLM2 = Head("SmolLM2", 49152, 576)
QWEN3 = Head("Qwen3-0.6B", 151936, 1024)
GEMMA3 = Head("Gemma-3-270m", 262144, 640)
LLAMA3 = Head("Llama-3-8B", 128256, 4096)
QWEN25 = Head("Qwen2.5-7B", 152064, 3584)
HEADS = (SMOLLM2, QWEN3, GEMMA3, LLAMA3, QWEN25)


@dataclass(frozen=True)
class Shape:
    head: Head
    rows: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.head.name}-{self.rows}-{dtype_name(self.dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _table(dtype, *entries) -> list[Shape]:
    return [Shape(head, rows, dtype) for head, *counts in entries for rows in counts]


# The CPU's rows fit `pytest bench/` into four minutes on two cores; `--long` adds the rest up to 128k.
CPU = {
    "stats": [
        *_table(torch.float32, (SMOLLM2, 256, 1024), (QWEN3, 256)),
        Shape(SMOLLM2, 512, torch.bfloat16),
    ],
    "stats_backward": [*_table(torch.float32, (SMOLLM2, 512)), Shape(SMOLLM2, 512, torch.bfloat16)],
    "linear_stats": _table(torch.float32, (SMOLLM2, 256)),
    "linear_policy": [],  # with --long; "sega" has nearly all of their rivals
    "nll": [],
    "sega": _table(torch.float32, (SMOLLM2, 128)),
    "sega_padded": _table(torch.float32, (SMOLLM2, 128)),
    "sega_frozen": [],  # with --long
}
CPU_LONG = {
    "nll": _table(torch.float32, (SMOLLM2, 128)),
    "linear_policy": _table(torch.float32, (SMOLLM2, 256)),
    "stats": _table(torch.float32, (SMOLLM2, 16384), (GEMMA3, 1024), (LLAMA3, 1024)),
    "linear_stats": _table(torch.float32, (SMOLLM2, 4096, 16384, 65536, 131072)),
    "sega": _table(torch.float32, (SMOLLM2, 1024, 4096, 16384)),
    "sega_padded": _table(torch.float32, (SMOLLM2, 1024)),
    "sega_frozen": _table(torch.float32, (SMOLLM2, 4096)),  # 8 candidates of 512 tokens
}
_ALL = tuple((head, 4096) for head in HEADS)
CUDA = {
    "stats": _table(torch.bfloat16, (SMOLLM2, 1024, 4096, 16384, 65536, 131072), *_ALL[1:], (QWEN3, 32768)),
    "stats_backward": _table(torch.bfloat16, (SMOLLM2, 1024, 4096, 16384, 65536, 131072), *_ALL[1:]),
    "linear_stats": _table(torch.bfloat16, (QWEN3, 1024, 4096, 16384, 65536, 131072), *((h, 8192) for h in HEADS)),
    "linear_policy": _table(torch.bfloat16, (QWEN3, 1024, 4096, 16384, 131072), *((h, 8192) for h in HEADS)),
    "nll": _table(torch.bfloat16, *((h, 8192) for h in HEADS)),
    "sega": _table(torch.bfloat16, (QWEN3, 1024, 4096, 16384, 65536, 131072), *((h, 8192) for h in HEADS)),
    "sega_padded": _table(torch.bfloat16, *((h, 8192) for h in HEADS)),
    "sega_frozen": _table(torch.bfloat16, *((h, 32768) for h in HEADS)),  # 8 candidates of 4,096 tokens
}


def shapes(work: str, device: str, long: bool = False) -> list[Shape]:
    """The shapes of a work on "cpu" or "cuda"."""
    table = CUDA if device == "cuda" else CPU
    return table[work] + (CPU_LONG.get(work, []) if long and device == "cpu" else [])
