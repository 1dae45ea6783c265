"""Several processes as one: what a process does of a step, and sums, lists and parameters over all of them.

The unit of work is a prompt. Every process knows the whole step: it samples its share of the prompts, the candidates
are gathered, and scores, denominators and metrics are computed from all of them everywhere. So there is nothing to
average and nothing that depends on how many processes there are. `accelerate launch` starts the processes
(on CPUs, which it runs one process on, `torchrun`); with one process every function here is the identity.

Data parallel (a whole model in each process) needs no wrapper: the gradient is a sum, which `Trainer.step` takes over
the processes before the step. DistributedDataParallel would reduce it from hooks of each backward, and would have to
know which micro-batch is the last. FSDP2 shards the parameters and reduces in its own backward, and so does
DeepSpeed's ZeRO (gem.parallel.deepspeed).
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gem.errors import UserError
from gem.parallel import deepspeed

Item = TypeVar("Item")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main() -> bool:
    """True in the one process that writes."""
    return rank() == 0


def share(items: Sequence[Item]) -> Sequence[Item]:
    """This process's part of `items`: every world_size-th, from its rank on."""
    return items[rank() :: world_size()]


def gather(part: Sequence[Item]) -> list[Item]:
    """The whole list of which every process gives its `share`, in the order of the whole; on every process."""
    if world_size() == 1:
        return list(part)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(part))
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def sum_over_processes(values: Sequence[float]) -> list[float]:
    """Element by element, in float64; a NaN or infinity of one process reaches all."""
    if world_size() == 1:
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device=_wire_device())
    dist.all_reduce(total)
    return total.tolist()


def wait_for_all() -> None:
    if world_size() > 1:
        dist.barrier()


def shut_down() -> None:
    """Before the process ends: a group that is left open aborts it from one of its threads."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def make_accelerator(device: str = "auto") -> Accelerator:
    """accelerate's view of how this process was launched; `device` "cpu" keeps it off the accelerators."""
    if device == "cpu" or not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would print that it looked for one
    if deepspeed.is_asked_for():
        if not deepspeed.is_installed():
            raise UserError("accelerate: deepspeed is not installed: pip install deepspeed, or launch without it")
        deepspeed.leave_shared_memory_out()
        return Accelerator()  # told `cpu`, accelerate would leave DeepSpeed out
    accelerator = Accelerator(cpu=device == "cpu")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("accelerate: FSDP version 1 is not supported; launch with --fsdp_version 2")
    if accelerator.mixed_precision != "no" and accelerator.distributed_type != DistributedType.FSDP:
        raise UserError(
            f"accelerate: mixed precision is {accelerator.mixed_precision} in this process; launch with "
            "--mixed_precision no (after another trainer, begin a new process); `dtype` of the config says how weights "
            "are kept"
        )
    return accelerator


def prepare_model(model: nn.Module, accelerator: Accelerator, max_grad_norm: float) -> nn.Module:
    """The model as every process trains it: the same weights everywhere, or, if sharded, its share of them."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        deepspeed.prepare(model, accelerator, max_grad_norm)
        return model
    if world_size() == 1:
        return model
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            dist.broadcast(tensor.data, src=0)
    if accelerator.distributed_type == DistributedType.FSDP:
        return fsdp2_prepare_model(accelerator, model)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":  # accelerate shards on accelerators only
        return shard(model)
    return model


def shard(model: nn.Module) -> nn.Module:
    """fully_shard on every decoder layer (the model's own `_no_split_modules`) and on the rest."""
    whole_blocks = {name for module in model.modules() for name in (getattr(module, "_no_split_modules", None) or ())}
    for module in model.modules():
        if type(module).__name__ in whole_blocks:
            fully_shard(module)
    return fully_shard(model)


def is_sharded(model: nn.Module) -> bool:
    """True where no process has the whole weights."""
    return deepspeed.is_partitioned(model) or any(isinstance(module, FSDPModule) for module in model.modules())


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within, forward passes without gradient need no other process: sharded parameters are whole everywhere.

    Sampling needs it, as the processes' rows end at different tokens; it costs the memory of the whole weights.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not shards:
        with deepspeed.gathered(model):
            yield
        return
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)  # FSDP2's default: all but the root


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a parameter that may be sharded, detached; a collective under FSDP2 and ZeRO."""
    if deepspeed.is_part(tensor):
        return deepspeed.whole_tensor(tensor)
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_into(parameter: Tensor, value: Tensor) -> None:
    """`parameter` becomes the whole tensor `value`, this process's shard of it under FSDP2 and ZeRO."""
    value = value.to(parameter.device, parameter.dtype)
    if deepspeed.is_part(parameter):
        deepspeed.copy_into(parameter, value)
        return
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def set_parameter(parameter: nn.Parameter, value: Tensor) -> None:
    """`copy_into`, for the optimizer too: ZeRO's has weights of its own, which would win at its next step."""
    copy_into(parameter, value)
    deepspeed.set_master(parameter, value)


def local_part(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter, to be read and written in place."""
    if deepspeed.is_part(parameter):
        return deepspeed.local_part(parameter)
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.data


def _wire_device() -> torch.device:
    """Where a tensor must be for the process group's backend."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def on_main(action: Callable[[], Any]) -> None:
    """`action` in the main process; its UserError is raised in every process."""
    problem: list[str | None] = [None]
    if is_main():
        try:
            action()
        except UserError as error:
            if world_size() == 1:
                raise
            problem = [str(error)]
    if world_size() > 1:
        dist.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise UserError(problem[0])


def whole_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """What to save of a sharded model: every parameter and lasting buffer, whole, on the CPU. None where it is whole.

    A collective. Tied parameters stay one tensor.
    """
    if not is_sharded(model):
        return None
    whole: dict[int, Tensor] = {}
    for parameter in model.parameters():
        tensor = whole_tensor(parameter)
        whole[id(parameter)] = tensor.cpu() if is_main() else tensor.new_empty(0)
    state = {name: whole[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    return {name: state[name] if name in state else value.cpu() for name, value in model.state_dict().items()}


def random_state() -> dict[str, Any]:
    """The state of this process's generators: Python's, numpy's, torch's on the CPU and on every GPU."""
    kind, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": (kind, list(words), gauss),
        "numpy": (name, keys.tolist(), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    kind, words, gauss = state["python"]
    random.setstate((kind, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
