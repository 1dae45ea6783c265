"""LoRA adapters: put on a model, read from a directory, written to one.

A directory that holds an adapter has `adapter_config.json`, which names the model it belongs to, and
`adapter_model.safetensors`, as peft writes them. Weights are read from safetensors only.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from gem.config.settings import Lora
from gem.errors import UserError
from gem.model.checks import check_finite, some_of
from gem.model.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from gem.parallel import processes


def add_lora(model: PreTrainedModel, lora: Lora) -> nn.Module:
    """The model under a fresh adapter, the only part of it that trains, in float32 (peft's own choice).

    The output head never carries an adapter: its logits are made by the kernels, from its plain weight.
    """
    peft = _peft("use_peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=_targets(model, lora.lora_target_modules),
    )
    return peft.get_peft_model(model, config)


def load_adapter(model: PreTrainedModel, directory: str, *, trainable: bool) -> nn.Module:
    """The model under the adapter of `directory`, to be trained on; or, not `trainable`, with it merged in."""
    peft = _peft("model")
    try:
        with safe_open(Path(directory) / ADAPTER_WEIGHTS, "pt") as file, warnings.catch_warnings():
            there = set(file.keys())
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # said below, as an error
            adapted = peft.PeftModel.from_pretrained(model, directory, is_trainable=trainable, use_safetensors=True)
    except Exception as error:  # foreign files break in any way
        why = " ".join(str(error).split())[:300]
        raise UserError(f"model: cannot load the adapter in {directory}: {why}") from error
    wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    unknown = {key for key in there - wanted if key not in adapted.state_dict()}
    if wanted - there or unknown:
        faults = (("missing", wanted - there), ("no part of it", unknown))
        raise UserError(
            f"model: {directory}: its weights are not those that {ADAPTER_CONFIG} describes; "
            f"{'; '.join(f'{what}: {some_of(keys)}' for what, keys in faults if keys)}; get the adapter again"
        )
    check_finite(((key, p) for key, p in adapted.named_parameters() if "lora_" in key), directory)
    # Merged it is a model like any other; peft had frozen it.
    return adapted if trainable else adapted.merge_and_unload().requires_grad_(True)


def is_adapted(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def is_untouched(model: nn.Module) -> bool:
    """True where the adapter changes nothing yet: every B is zero, nothing else trains. A collective if sharded."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            if "lora_B" not in name:
                return False
            if bool(processes.whole_tensor(parameter).any()):
                return False
    return True


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights with the adapter added, under the names of the model without it; the model stays as it is."""
    base = model.get_base_model()
    state = {
        name.replace(".base_layer.", "."): value for name, value in base.state_dict().items() if ".lora_" not in name
    }
    for name, module in base.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            for adapter in module.active_adapters:
                weight = state[f"{name}.weight"]
                state[f"{name}.weight"] = weight + module.get_delta_weight(adapter).to(weight.dtype)
    return state


def _targets(model: PreTrainedModel, names: str) -> str | list[str]:
    if names == "all-linear":
        return names  # peft leaves the output embeddings out of it
    modules = dict(model.named_modules())
    targets = [name.strip() for name in names.split(",") if name.strip()]
    for target in targets:
        found = [name for name in modules if name == target or name.endswith(f".{target}")]
        if any(modules[name] is model.get_output_embeddings() for name in found):
            raise UserError(
                f"lora_target_modules: {target} is the output head, which carries no adapter here (the kernels make "
                "the logits from its plain weight): leave it out"
            )
        if not found:
            linear = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)}
            linear -= {name.rpartition(".")[2] for name, m in modules.items() if m is model.get_output_embeddings()}
            raise UserError(
                f"lora_target_modules: the model has no {target!r}; expected all-linear or some of "
                f"{','.join(sorted(linear))}"
            )
    if not targets:
        raise UserError("lora_target_modules: expected all-linear or names with commas between, got nothing")
    return targets


def quiet_bitsandbytes() -> None:
    """On importing it, which peft does, it warns of a kernel that it would take from a hub and does well without."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _peft(setting: str) -> Any:
    quiet_bitsandbytes()
    try:
        import peft
    except ImportError as error:
        raise UserError(f"{setting}: LoRA adapters need peft: pip install peft") from error
    return peft
