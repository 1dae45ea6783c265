"""The keys and values of a batch that is being sampled, in memory with room for tokens to come.

transformers' `DynamicCache` makes new tensors of all keys and values for each token: on a CPU a quarter of the time of
sampling. These layers write a token's into its place, and make new tensors once in `ROOM` tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens


class RoomyLayer(DynamicLayer):
    """`keys` and `values` [B, heads, length, D] are the beginning of `memory`, where there is one. Without gradient."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.memory: list[Tensor] = []  # of keys and of values, [B, heads, length + room, D]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if start == 0:  # a prompt, of which there may be several copies soon: no room yet
            self.memory = []
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.memory or end > self.memory[0].shape[-2]:
            self.memory = [_with_room(x, end + ROOM) for x in (self.keys, self.values)]
        for memory, new in zip(self.memory, (key_states, value_states)):
            memory[:, :, start:end] = new
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """In the same memory: what the rows that go had is free when it is made anew."""
        if not self.memory:
            super().batch_select_indices(indices)
            return
        length, kept = self.get_seq_length(), [x[indices] for x in (self.keys, self.values)]
        self.memory = [memory[: len(x)] for memory, x in zip(self.memory, kept)]
        for memory, x in zip(self.memory, kept):
            memory[:, :, :length] = x
        self._show(length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.memory = []

    def reset(self) -> None:
        super().reset()
        self.memory = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.memory = []

    def _show(self, length: int) -> None:
        self.keys, self.values = (memory[:, :, :length] for memory in self.memory)


def sampling_cache(config: PreTrainedConfig) -> DynamicCache:
    """The model's own cache; plain layers have room, those of windows and of states are left as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _with_room(x: Tensor, length: int) -> Tensor:
    memory = torch.empty(*x.shape[:2], length, x.shape[-1], dtype=x.dtype, device=x.device)
    memory[:, :, : x.shape[-2]] = x
    return memory
