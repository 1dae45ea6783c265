"""The Trainer under DeepSpeed's ZeRO: the same steps, taken by DeepSpeed's engine.

What differs: the engine sums and divides the gradient during backward, keeps the optimizer's float32 weights and
moments in shares, and skips a step by itself where the gradient is not finite. The state dict is whole all the same,
so that a checkpoint depends neither on the stage nor on DeepSpeed's own files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gem.model.forward import Policy
from gem.parallel import deepspeed, processes
from gem.update.optimizer import Item, StepResult, Trainer

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedTrainer(Trainer):
    """For a model that `deepspeed.prepare` put under an engine. One at a time: a new one starts the optimizer anew."""

    def __init__(self, policy: Policy, *arguments: Any, **more: Any) -> None:
        self.engine = deepspeed.engine_of(policy.model)
        super().__init__(policy, *arguments, **more)
        self._sharded = True  # the processes must run as many backward passes as each other
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.settings.weight_decay
        self._make_moments()

    def _make_optimizer(self) -> Any:
        return self.engine.optimizer

    def micro_batches(self, items: Sequence[Item]) -> Iterator[tuple[list[Item], float]]:
        parts = list(super().micro_batches(items))
        for number, part in enumerate(parts, 1):
            self.engine.set_gradient_accumulation_boundary(number == len(parts))
            yield part

    def backward(self, loss: Tensor) -> None:
        self._count(loss)
        # A loss that is not finite must skip the step even where its gradient happens to be finite.
        factor = torch.where(loss.detach().isfinite(), float(processes.world_size()), math.nan)
        self.engine.backward(loss * factor, scale_wrt_gas=False)  # ZeRO takes the mean over the processes

    def step(self) -> StepResult:
        result = StepResult(self._summed_loss(), 0.0, self.learning_rate)
        if self._loss is not None:  # else there was no backward, in any process
            self._set_rate(self.learning_rate)
            self.engine.step()
            skipped = not self.engine.was_step_applied()
            norm = math.nan if skipped else float(self.engine.get_global_grad_norm())
            result = replace(result, grad_norm=norm, skipped=skipped)
        self._finish(result.skipped)
        return result

    def state_dict(self) -> dict[str, Any]:
        """As the plain Trainer's, but for the number of steps, which is one for all moments. A collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        def whole(value: Tensor) -> Tensor:
            return value.detach().cpu().clone().contiguous()

        moments = [{key: whole(safe_get_full_optimizer_state(p, key)) for key in _MOMENTS} for p in self.trained]
        return {
            "moments": moments,
            "masters": [whole(safe_get_full_fp32_param(p)) for p in self.trained],
            "adam_steps": self._adam_steps(),
            "num_steps": self.num_steps,
            "bad_steps": self.bad_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for parameter, moments, master in zip(self.trained, state["moments"], state["masters"], strict=True):
            self._set_moments(parameter, moments)
            deepspeed.set_master(parameter, master)
        self._set_adam_steps(state["adam_steps"])
        self.num_steps, self.bad_steps = state["num_steps"], state["bad_steps"]

    def _make_moments(self) -> None:
        """All moments there and zero, no steps taken. ZeRO makes them in its first step, so one of rate 0 is taken."""
        device = self.model.device
        self._set_rate(0.0)
        self.engine.set_gradient_accumulation_boundary(True)
        ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
        loss = self.engine(lambda: self.model(input_ids=ids).logits.float().mean())
        self.engine.backward(0.0 * loss)
        self.engine.step()
        for parameter in self.trained:
            self._set_moments(parameter, dict.fromkeys(_MOMENTS, torch.zeros(())))
        self._set_adam_steps(0)

    def _set_moments(self, parameter: nn.Parameter, moments: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        shape = getattr(parameter, "ds_shape", parameter.shape)
        for key, value in moments.items():
            whole = value.to(parameter.device, torch.float32).expand(shape).contiguous()
            safe_set_full_optimizer_state(parameter, whole, key)

    def _adam_steps(self) -> int:
        """Steps that AdamW has taken: in the state of a parameter, or in its group, by implementation."""
        inner = self.engine.optimizer.optimizer
        found = [state["step"] for state in inner.state.values() if "step" in state]
        found += [group["step"] for group in inner.param_groups if "step" in group]
        return int(found[0]) if found else 0

    def _set_adam_steps(self, steps: int) -> None:
        inner = self.engine.optimizer.optimizer
        for holder in (*inner.state.values(), *inner.param_groups):
            if isinstance(holder.get("step"), Tensor):
                holder["step"].fill_(steps)
            elif "step" in holder:
                holder["step"] = steps
