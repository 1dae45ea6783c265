"""A policy with AdamW and its learning rate, over any number of processes.

result = trainer.take_step(items, lambda part, weight: loss_of(part))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gem.config.settings import OptimizerSettings
from gem.model.forward import Policy
from gem.parallel import processes
from gem.scoring.score import ScoredRollout

Item = TypeVar("Item")
# Elements of the gradient that are reduced together: 64 MiB of float32.
_BUCKET = 1 << 24


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did, or the `num_iterations` of a SEGA step: loss and grad_norm are then their means.

    loss is the sum over micro-batches and processes, grad_norm the norm before clipping, learning_rate that of the
    first step (None: there was nothing to learn from), num_tokens what the gradients were made of.
    """

    loss: float
    grad_norm: float
    learning_rate: float | None = None
    skipped: bool = False  # the loss or a gradient was not finite, or there was none: at least one step was not taken
    num_tokens: int = 0
    num_sequences: int = 0
    metrics: dict[str, float] = field(default_factory=dict)  # more of the objective's own, under TRL's names
    note: str = ""  # a few words for the progress bar
    scored: ScoredRollout | None = None  # the candidates, where there were any


NO_STEP = StepResult(0.0, 0.0, skipped=True)


class Trainer:
    """AdamW over the parameters that require a gradient.

    The learning rate is a function of the step's number alone: `warmup_steps` up from 0, then constant, or linear to 0
    at `total_steps`. A skipped step counts.
    """

    def __init__(
        self,
        policy: Policy,
        accelerator: Accelerator,
        settings: OptimizerSettings,
        *,
        learning_rate: float,
        total_steps: int,
    ) -> None:
        self.policy, self.model = policy, policy.model  # as processes.prepare_model returned it
        self.accelerator, self.settings = accelerator, settings
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self._sharded = processes.is_sharded(self.model)
        self.base_rate, self.total_steps = learning_rate, total_steps
        self.optimizer = self._make_optimizer()
        self.num_steps = 0
        self.bad_steps = 0  # skipped ones in a row
        self._loss: Tensor | None = None

    def _make_optimizer(self) -> torch.optim.Optimizer:
        self.parameters = [_master(p) for p in self.trained]  # what the optimizer moves
        # On the CPU the fused AdamW takes a seventh of the plain one's time: it passes over the weights once.
        fused = not self._sharded and all(p.device.type == "cpu" for p in self.parameters)
        return torch.optim.AdamW(self.parameters, weight_decay=self.settings.weight_decay, fused=fused or None)

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        total, warmup = self.total_steps, self.settings.warmup_steps
        if self.num_steps < warmup:
            return self.base_rate * (self.num_steps + 1) / warmup
        left = max(0.0, (total - self.num_steps) / max(1, total - warmup))
        if self.settings.lr_schedule == "linear":
            return self.base_rate * left
        if self.settings.lr_schedule == "cosine":
            return self.base_rate * (1 - math.cos(math.pi * left)) / 2
        return self.base_rate

    def take_step(self, items: Sequence[Item], loss_of: Callable[[list[Item], float], Tensor]) -> StepResult:
        """One step on the sum of `loss_of(part, weight)` over the micro-batches of `items`.

        A loss is already divided by the whole step's count, over all processes, so the gradient is the gradient of
        that sum, whatever the micro-batches and the number of processes. weight: 1, or 0 where a part is run only to
        keep in step with another process, and nothing of it may be counted.
        """
        self.model.train()
        for part, weight in self.micro_batches(items):
            self.backward(weight * loss_of(part, weight))
        self.model.eval()
        return self.step()

    def micro_batches(self, items: Sequence[Item]) -> Iterator[tuple[list[Item], float]]:
        """This process's share of the step's `items`, in micro-batches, each with the weight of its loss, 1.0.

        Sharded processes must run as many forwards as each other: where one has fewer, it gets its first items, or
        the step's, once more with weight 0.0.
        """
        mine, size = list(processes.share(items)), self.settings.micro_batch_size
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        yield from ((part, 1.0) for part in parts)
        if self._sharded:
            most = -(-len(items) // processes.world_size())  # of rank 0
            for _ in range(-(-most // size) - len(parts)):
                yield list(parts[0] if parts else items[:1]), 0.0

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a part of the step's loss."""
        self._count(loss)
        if self._sharded:
            loss = loss * processes.world_size()  # FSDP2 takes the mean over the processes
        loss.backward()
        for parameter, master in self._masters():
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def step(self) -> StepResult:
        """Sums the gradient over the processes, clips it, takes the step and clears it."""
        if processes.world_size() > 1 and not self._sharded:
            self._reduce_gradients()
        loss, norm, rate = self._summed_loss(), self._clip(), self.learning_rate
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if not skipped:
            self._set_rate(rate)
            self._step_weights()
        self.optimizer.zero_grad(set_to_none=True)
        self._finish(skipped)
        return StepResult(loss, norm, rate, skipped)

    def skip(self, number: int = 1) -> StepResult:
        """Steps without anything to learn from: they count in the learning rate, and are no fault."""
        self.num_steps += number
        return NO_STEP

    def state_dict(self) -> dict[str, Any]:
        """Moments and master weights (whole, on the CPU) and counts: tensors and numbers. A collective if sharded."""
        moments = []
        for parameter in self.parameters:
            state = self.optimizer.state.get(parameter, {})
            moments.append({key: processes.whole_tensor(value).cpu().clone() for key, value in state.items()})
        masters = [processes.whole_tensor(master).cpu().clone() for _, master in self._masters()]
        return {"moments": moments, "masters": masters, "num_steps": self.num_steps, "bad_steps": self.bad_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, for a trainer made with the same arguments."""
        for parameter, saved in zip(self.parameters, state["moments"], strict=True):
            self.optimizer.state.pop(parameter, None)
            if not saved:
                continue
            moments = {key: torch.zeros_like(parameter) for key in saved if key != "step"}
            for key, tensor in moments.items():
                processes.copy_into(tensor, saved[key])
            self.optimizer.state[parameter] = {"step": saved["step"].clone(), **moments}
        for (_, master), saved in zip(self._masters(), state["masters"], strict=True):
            processes.copy_into(master, saved)
        self.num_steps, self.bad_steps = state["num_steps"], state["bad_steps"]

    def _count(self, loss: Tensor) -> None:
        part = loss.detach().double()
        self._loss = part if self._loss is None else self._loss + part

    def _summed_loss(self) -> float:
        """Of the micro-batches of all processes."""
        return processes.sum_over_processes([0.0 if self._loss is None else self._loss.item()])[0]

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _finish(self, skipped: bool) -> None:
        self._loss = None
        self.num_steps += 1
        self.bad_steps = self.bad_steps + 1 if skipped else 0

    def _masters(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters of 16 bits, each with its master weight."""
        return [(p, master) for p, master in zip(self.trained, self.parameters) if master is not p]

    @torch.no_grad()
    def _step_weights(self) -> None:
        """AdamW, on the master weights where there are some. Weights set since the last step win over their masters."""
        for parameter, master in self._masters():
            master.copy_(torch.where(master.to(parameter.dtype) == parameter, master, parameter.float()))
        self.optimizer.step()
        for parameter, master in self._masters():
            parameter.copy_(master)

    def _clip(self) -> float:
        """Scales the gradient to a norm of at most `max_grad_norm`; the norm before it."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        size = float(norm)
        if not size <= self.settings.max_grad_norm:  # else it would be a pass over the gradient to multiply it by 1
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.max_grad_norm, norm)
        return size

    @torch.no_grad()
    def _reduce_gradients(self) -> None:
        """The sum over the processes, in float32, in buckets. A parameter without a gradient anywhere keeps none."""
        device = self.parameters[0].device
        has = torch.tensor([float(p.grad is not None) for p in self.parameters], device=device)
        dist.all_reduce(has)
        bucket: list[Tensor] = []
        for parameter, anywhere in zip(self.parameters, has.tolist()):
            if not anywhere:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(grad.numel() for grad in bucket) >= _BUCKET:
                _sum_together(bucket)
                bucket = []
        if bucket:
            _sum_together(bucket)


def _master(parameter: nn.Parameter) -> Tensor:
    """The parameter, or, where it has 16 bits, a float32 copy: in bfloat16 a weight moves by 1/256 of itself or not at
    all, and steps of a learning rate of 1e-6 would be lost."""
    if parameter.dtype not in (torch.bfloat16, torch.float16):
        return parameter
    return parameter.detach().float().requires_grad_()


def _sum_together(gradients: list[Tensor]) -> None:
    flat = torch.cat([grad.flatten().float() for grad in gradients])
    dist.all_reduce(flat)
    for grad, total in zip(gradients, flat.split([grad.numel() for grad in gradients])):
        grad.copy_(total.view_as(grad))
