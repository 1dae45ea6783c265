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
from torch.distributed.tensor import DTensor

from gem import distributed
from gem.adapters import is_adapted, is_untouched
from gem.policy import inner_model


class StartingPolicy:
    """The policy as it was when this was made, in the same model object. One extra copy of what trains, or less."""

    def __init__(self, model: nn.Module) -> None:
        self.model = inner_model(model)
        self.kept: dict[str, Tensor] = {}
        if not (is_adapted(self.model) and is_untouched(self.model)):
            self.kept = {name: p.detach().clone() for name, p in self._trained()}

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

    def state_dict(self) -> dict[str, Tensor]:
        """What is kept, whole and on the CPU; empty where the adapter is disabled. A collective under FSDP2."""
        return {name: distributed.whole_tensor(value).cpu() for name, value in self.kept.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Becomes the starting policy that `state_dict` was taken from, whatever the model is now."""
        self.kept = {name: p.detach().clone() for name, p in self._trained() if name in state}
        if set(self.kept) != set(state):
            raise ValueError(
                f"state: expected the weights of this model, got also {sorted(set(state) - set(self.kept))}"
            )
        for name, value in state.items():
            distributed.copy_into(self.kept[name], value)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swaps the weights with the kept ones: pointers, or, where FSDP2 holds views of a shard, what they hold."""
        parameters = dict(self._trained())
        for name, kept in self.kept.items():
            parameter = parameters[name]
            if isinstance(parameter, DTensor):
                here, there = parameter.to_local(), kept.to_local()
                now = here.clone()
                here.copy_(there)
                there.copy_(now)
            else:
                parameter.data, self.kept[name] = kept, parameter.data
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what is gathered is of the weights before
