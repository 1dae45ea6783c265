"""DeepSpeed's ZeRO (stages 1 to 3), as `accelerate launch --use_deepspeed` sets it up with DeepSpeed's own config.

The engine wraps a module whose forward runs whatever it is given, so that a forward pass and its fused loss, which
reads the head's weight, are one forward of the engine: under stage 3 DeepSpeed gathers and releases weights around
the forward of the module that uses them. Everything else goes on working on the model itself. DeepSpeed is imported
only where it was asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gem.errors import UserError

Output = TypeVar("Output")
_ENGINE = "deepspeed_engine"  # where a model keeps its engine; not a submodule of it


def is_asked_for() -> bool:
    """True where `accelerate launch` was told to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def is_installed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def leave_shared_memory_out() -> None:
    """On a CPU: DeepSpeed compiles no C++ (a minute or more) for a collective that only its inference calls.

    `inference_all_reduce` takes torch's collective where the operator is marked as not compatible.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def prepare(model: nn.Module, accelerator: Accelerator, max_grad_norm: float) -> None:
    """Puts the model under an engine. The optimizer is AdamW; its rate and its state are the Trainer's matter."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    fill_config(accelerator.state.deepspeed_plugin.deepspeed_config, dtypes, max_grad_norm)
    # DeepSpeed calls collectives by names that newer releases of torch advise against.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    engine, _ = accelerator.prepare(_Whatever(model), optimizer)
    vars(model)[_ENGINE] = engine


def fill_config(config: dict[str, Any], dtypes: set[torch.dtype], max_grad_norm: float) -> None:
    """Puts into DeepSpeed's config what the run's own settings say; raises where the two differ."""
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise UserError(
            f"deepspeed: zero_optimization.stage is {json.dumps(stage)}; expected 1, 2 or 3 (stage 0 is plain data "
            "parallel: launch without --use_deepspeed)"
        )
    for name, own in (("optimizer", "learning_rate and weight_decay"), ("scheduler", "lr_schedule and warmup_steps")):
        if name in config:
            raise UserError(f"deepspeed: remove {name!r} from its config; {own} of the run's config stand for it")
    half = torch.bfloat16 in dtypes
    for name, wanted in (("fp16", False), ("bf16", half)):
        if config.get(name, {}).get("enabled") is True and not wanted:
            dtype = "bfloat16" if half else "float32"
            raise UserError(f"deepspeed: {name} is enabled in its config, but dtype is {dtype}: use 'auto'")
    config.pop("fp16", None)
    # With the check, a gradient that is not finite skips the step.
    config["bf16"] = {"check_grad_overflow": True, **config.get("bf16", {}), "enabled": half}
    clipping = config.get("gradient_clipping", "auto")
    if clipping not in ("auto", max_grad_norm):
        raise UserError(f"deepspeed: gradient_clipping is {clipping}, but max_grad_norm is {max_grad_norm}: use 'auto'")
    config["gradient_clipping"] = max_grad_norm
    # The Trainer says itself which micro-batch is a step's last, and divides the losses; these are for DeepSpeed's log.
    config["gradient_accumulation_steps"] = 1
    config["train_micro_batch_size_per_gpu"] = 1
    config.pop("train_batch_size", None)


def engine_of(model: nn.Module) -> Any:
    """The engine of a model, None where it has none."""
    return vars(model).get(_ENGINE)


def is_partitioned(model: nn.Module) -> bool:
    """True under stage 3, which divides the weights themselves."""
    engine = engine_of(model)
    return engine is not None and engine.zero_optimization_stage() == 3


def forward(model: nn.Module, compute: Callable[[], Output]) -> Output:
    """compute(), which runs the model and gives a dataclass; with gradients within the engine's forward."""
    engine = engine_of(model)
    if engine is None or not torch.is_grad_enabled():
        return compute()
    kinds: list[Any] = []

    def fields() -> dict[str, Any]:
        """DeepSpeed's hooks find tensors in a dict, not in a dataclass."""
        output = compute()
        kinds.append(type(output))
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}

    found = engine(fields)
    return kinds[0](**found)


class _Whatever(nn.Module):
    """Runs any function of the model, as a forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        if hasattr(model, "config"):
            self.config = model.config  # accelerate reads the hidden size where the config says "auto"

    def forward(self, compute: Callable[[], Any]) -> Any:
        return compute()


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Stage 3: within, all weights are whole, and forward passes without gradient need no other process."""
    if not is_partitioned(model) or is_gathered(model):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    # The hooks of the modules would release the weights after each layer, and wait for the other processes.
    offload = engine_of(model).optimizer.parameter_offload
    offload._remove_module_hooks()
    offload.forward_hooks, offload.backward_hooks = [], []
    vars(model)["weights_gathered"] = True
    try:
        with GatheredParameters(list(model.parameters())):
            yield
    finally:
        vars(model)["weights_gathered"] = False
        for parameter in model.parameters():
            parameter.ds_active_sub_modules.clear()
        offload._register_deepspeed_module(offload.module)


def is_gathered(model: nn.Module) -> bool:
    return vars(model).get("weights_gathered", False)


def is_part(tensor: Tensor) -> bool:
    """True of a parameter that stage 3 has divided."""
    return hasattr(tensor, "ds_tensor")


def whole_tensor(parameter: Tensor) -> Tensor:
    """All of a divided parameter. A collective."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def local_part(parameter: Tensor) -> Tensor:
    """What this process keeps of a divided parameter; what was gathered of it is let go, as it may be changed."""
    if parameter.ds_status.name == "AVAILABLE":
        parameter.partition()
    return parameter.ds_tensor.data


@torch.no_grad()
def copy_into(parameter: Tensor, value: Tensor) -> None:
    """A divided parameter becomes the whole tensor `value`. A collective."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)


def set_master(parameter: Tensor, value: Tensor) -> None:
    """The float32 weights that the optimizer moves become the whole tensor `value`, where there are some."""
    if "deepspeed" in sys.modules and (is_part(parameter) or hasattr(parameter, "_hp_mapping")):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value.to(parameter.device).float())
