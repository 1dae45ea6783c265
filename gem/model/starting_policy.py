"""The starting policy: what the policy's drift is measured against, and DPO's reference.

    reference = StartingPolicy(model)            # as the model stands now
    ...                                          # the model trains on
    with reference.active():
        logprobs = measured_stats(model, batch, ...).logprobs

Only what trains can have moved, so only that is kept: nothing under a LoRA adapter that changes nothing yet (it is
disabled instead), the adapter where it has been trained before, all weights otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from gem.model.forward import inner_model
from gem.model.lora import is_adapted, is_untouched
from gem.parallel import deepspeed, processes


class StartingPolicy:
    """The policy as it was when this was made, in the same model object. One extra copy of what trains, or less."""

    def __init__(self, model: nn.Module) -> None:
        self.model = inner_model(model)
        self.kept: dict[str, Tensor] = {}
        if not (is_adapted(self.model) and is_untouched(self.model)):
            self.kept = {name: processes.local_part(p).clone() for name, p in self._trained()}

    @contextlib.contextmanager
    def active(self) -> Iterator[nn.Module]:
        """Within, the model is the starting policy, in eval mode. For forward passes without gradient."""
        self.model.eval()
        if not self.kept:
            with self.model.disable_adapter():
                yield self.model
            return
        self._exchange()
        try:
            yield self.model
        finally:
            self._exchange()

    @torch.no_grad()
    def average_into_model(self, share: float = 0.5) -> None:
        """The model's weights become (1 - share) * themselves + share * the starting policy's.

        The mean of a model before and after fine-tuning often keeps what both know (WiSE-FT, arXiv 2109.01903). A LoRA
        adapter that began at nothing is zero in the starting policy; of one that was trained before, A and B are
        averaged each by itself.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share: expected a number in [0, 1], got {share}")
        for name, parameter in self._trained():
            here = processes.local_part(parameter)
            if self.kept:
                here.lerp_(self.kept[name].to(here), share)
            elif "lora_B" in name:  # the adapter is B A: half of B is half of it
                here.mul_(1 - share)

    def state_dict(self) -> dict[str, Tensor]:
        """What is kept, whole and on the CPU; empty where the adapter is disabled. A collective if sharded."""
        if not self.kept:
            return {}
        self._exchange()
        try:
            return {name: processes.whole_tensor(p).cpu().clone() for name, p in self._trained()}
        finally:
            self._exchange()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Becomes the starting policy that `state_dict` was taken from, whatever the model is now."""
        parameters = dict(self._trained())
        if not set(state) <= set(parameters):
            raise ValueError(
                f"state: expected the weights of this model, got also {sorted(set(state) - set(parameters))}"
            )
        self.kept = {name: processes.local_part(parameters[name]).clone() for name in state}
        for name, value in state.items():
            processes.copy_into(parameters[name], value)
        self._exchange()

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swaps the weights with the kept ones: pointers, or, where FSDP2 or ZeRO hold views, what they hold."""
        parameters = dict(self._trained())
        in_place = processes.is_sharded(self.model) or deepspeed.engine_of(self.model) is not None
        for name, kept in self.kept.items():
            parameter = parameters[name]
            if in_place:
                here = processes.local_part(parameter)
                now = here.clone()
                here.copy_(kept)
                kept.copy_(now)
            else:
                parameter.data, self.kept[name] = kept, parameter.data
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what is gathered is of the weights before
