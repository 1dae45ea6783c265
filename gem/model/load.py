"""Loading and saving: a local directory, a GGUF file, a hub id or a LoRA adapter in; a directory of safetensors out.

No code from a model repository is ever run (`trust_remote_code=False`) and no pickle is opened.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file
from transformers.utils import logging as transformers_logging

from gem.config.settings import TrainConfig
from gem.errors import UserError, one_line
from gem.model.checks import (
    check_causal,
    check_finite,
    check_index,
    check_loaded,
    check_there,
    check_weights_file,
    not_loaded,
)
from gem.model.lora import add_lora, is_adapted, load_adapter, merged_state_dict, quiet_bitsandbytes
from gem.model.source import ModelSource

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
# Package and module of those that are not torch's.
FLASH = {
    "flash_attention_2": ("flash-attn", "flash_attn"),
    "flash_attention_3": ("flash-attn-3", "flash_attn_interface"),
}


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    if source.adapter and (Path(source.adapter) / "tokenizer_config.json").is_file():
        source = ModelSource(source.adapter, None)
    with _QuietTransformers():
        tokenizer = _load(AutoTokenizer, source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked everywhere, so its value never matters
    return tokenizer


def load_model_config(source: ModelSource) -> PreTrainedConfig:
    """The model's configuration, without its weights."""
    with _QuietTransformers():
        return _load(AutoConfig, source)


def context_length(config: PreTrainedConfig) -> int | None:
    """Positions the model was made for, None where its configuration does not say."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)


def load_model(
    source: ModelSource,
    config: PreTrainedConfig,
    dtype: str = "float32",
    device: str = "auto",
    *,
    attn_implementation: str = "auto",
    use_liger_kernel: bool = False,
) -> PreTrainedModel:
    """The causal language model in `dtype`, in eval mode, with plain trainable weights, GGUF or adapter or not."""
    device = find_device(device)
    attention = find_attention(attn_implementation, dtype, device)
    if use_liger_kernel:
        check_liger(config, device)
    extra = {} if source.gguf_file else {"use_safetensors": True}
    model = _load_weights(source, config=config, dtype=getattr(torch, dtype), attn_implementation=attention, **extra)
    if source.gguf_file:
        _forget_quantization(model)
    model = model.to(device)
    if use_liger_kernel:
        _apply_liger(model)
    _check_model(model.eval(), source)
    if source.adapter:
        model = load_adapter(model, source.adapter, trainable=False)
    return model.eval()


def load_model_for_training(source: ModelSource, config: PreTrainedConfig, settings: TrainConfig) -> nn.Module:
    """The model as `settings` ask for it: adapters, 4-bit weights, attention, Liger's layers, checkpointing.

    Under `use_peft` a peft model, of which only the adapter trains: a new one, or that of `source`. In eval mode.
    """
    device = find_device(settings.device)
    check_padding_free(settings, device)
    if settings.load_in_4bit:
        model = _load_in_4bit(source, config, settings, device)
    else:
        model = load_model(
            replace(source, adapter=None) if settings.use_peft else source,
            config,
            settings.dtype,
            device,
            attn_implementation=settings.attn_implementation,
            use_liger_kernel=settings.use_liger_kernel,
        )
    if settings.gradient_checkpointing:
        try:
            checkpoint_activations(model)
        except ValueError as error:
            raise UserError(f"gradient_checkpointing: {one_line(error)}") from error
    if settings.use_peft and source.adapter:
        model = load_adapter(model, source.adapter, trainable=True)
    elif settings.use_peft:
        model = add_lora(model, settings)
        if Path(source.name).is_dir():  # the adapter names its model; a relative path would not survive a cd
            model.peft_config["default"].base_model_name_or_path = str(Path(source.name).resolve())
    return model.eval()


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Backward recomputes activations. transformers renamed the method in 5.23."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def find_device(device: str) -> str:
    """`device`, once it is known to be there; auto is CUDA where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise UserError(f"device: cannot use {device!r}: {one_line(error)}") from error
    if kind == "meta":
        raise UserError("device: meta holds no numbers; expected auto, cpu, cuda, ...")
    return device


def find_attention(name: str, dtype: str, device: str) -> str | None:
    """What `attn_implementation` comes to: auto is flash-attn where it is installed and can run (CUDA, 16 bits), else
    None, transformers' own choice (sdpa where the model has it)."""
    has_flash = importlib.util.find_spec("flash_attn") is not None and device.startswith("cuda")
    if name == "auto":
        return "flash_attention_2" if has_flash and dtype == "bfloat16" else None
    if name not in ATTENTION:  # other names of transformers download code from a hub
        raise UserError(f"attn_implementation: expected auto, {', '.join(ATTENTION)}, got {name!r}")
    if name == "flex_attention" and not device.startswith("cuda"):  # on a CPU it has no backward
        raise UserError("attn_implementation: flex_attention needs a CUDA device: set it to auto")
    if name in FLASH:  # where its module is missing, transformers takes compiled code from a hub
        package, module = FLASH[name]
        if not (device.startswith("cuda") and dtype == "bfloat16" and importlib.util.find_spec(module) is not None):
            raise UserError(
                f"attn_implementation: {name} needs a CUDA device, dtype bfloat16 and {package}: set it to auto"
            )
    return name


def check_padding_free(settings: TrainConfig, device: str) -> None:
    if not settings.padding_free:
        return
    dtype = "bfloat16" if settings.load_in_4bit else settings.dtype
    if find_attention(settings.attn_implementation, dtype, device) not in ("flash_attention_2", "flash_attention_3"):
        raise UserError(
            "padding_free: packed rows need flash-attn, a CUDA device and dtype bfloat16: pip install flash-attn, or "
            "leave padding_free out"
        )


def check_4bit(device: str) -> None:
    """Raises unless bitsandbytes is there and has kernels for the device."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("load_in_4bit: needs bitsandbytes: pip install bitsandbytes, or leave load_in_4bit out")
    quiet_bitsandbytes()
    import bitsandbytes

    supported = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    if torch.device(device).type not in supported:
        raise UserError(
            f"load_in_4bit: bitsandbytes has no kernels for {device}, only for {', '.join(sorted(supported))}: "
            "set device, or leave load_in_4bit out"
        )


def check_liger(config: PreTrainedConfig, device: str) -> None:
    """Raises unless Liger's layers can run, and exist for this architecture."""
    if not device.startswith("cuda") or importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "use_liger_kernel: needs a CUDA device and liger-kernel: pip install liger-kernel, or leave it out"
        )
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"use_liger_kernel: liger-kernel has no layers for {config.model_type}: leave it out")


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *more: int) -> tuple[int, ...]:
    """Every token that ends an answer: of the generation config (one or a list), model, tokenizer, and `more`."""
    found: set[int] = set(more)
    for eos in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        if eos is not None:
            found.update([eos] if isinstance(eos, int) else eos)
    return tuple(sorted(found))


def save_pretrained(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes weights (safetensors), configuration and tokenizer; `AutoModelForCausalLM.from_pretrained` opens it.

    Under LoRA that is the adapter alone, with the name of its model (`AutoPeftModelForCausalLM` opens it too); but the
    whole, merged weights where that model came from a GGUF file, which those two could not find again. `weights`: the
    state dict of a model whose own parameters are shards.
    """
    with _QuietTransformers():
        if weights is not None:
            model.save_pretrained(directory, state_dict=weights)
        elif is_adapted(model) and not (
            getattr(model, "is_loaded_in_4bit", False)  # whole weights are not there to be saved
            or _can_reopen(model.peft_config["default"].base_model_name_or_path)
        ):
            model.get_base_model().save_pretrained(directory, state_dict=merged_state_dict(model))
        else:
            model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def _can_reopen(base_model: str) -> bool:
    """True for a hub id and for a directory of transformers; a directory is named by its absolute path."""
    return not Path(base_model).is_absolute() or (Path(base_model) / "config.json").is_file()


def _load_in_4bit(source: ModelSource, config: PreTrainedConfig, settings: TrainConfig, device: str) -> PreTrainedModel:
    """Linear layers in 4 bits (NF4, double quantization, as QLoRA), the head and the rest in bfloat16."""
    check_4bit(device)
    if source.gguf_file:
        raise UserError("load_in_4bit: a GGUF file cannot be quantized again: give a directory or a hub id")
    if is_deepspeed_zero3_enabled():
        raise UserError("load_in_4bit: stage 3 of DeepSpeed's ZeRO cannot divide 4-bit weights: use stage 1 or 2")
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    if settings.use_liger_kernel:
        check_liger(config, device)
    model = _load_weights(
        source,
        config=config,
        dtype=torch.bfloat16,
        attn_implementation=find_attention(settings.attn_implementation, "bfloat16", device),
        quantization_config=quantization,
        device_map={"": device},
        use_safetensors=True,
    )
    if device.startswith("cpu"):
        _make_4bit_safe_on_cpu(model)
    if settings.use_liger_kernel:
        _apply_liger(model)
    _check_model(model.eval(), source)
    return model


def _make_4bit_safe_on_cpu(model: PreTrainedModel) -> None:
    """Around two errors of bitsandbytes on the CPU, as of its version 0.50.2."""
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        # With AVX512-BF16 a layer's first forward in eval mode changes its weight to a layout whose product has no
        # gradient, for good: after one evaluation the layers below it would get a wrong one in silence.
        module.support_avx512bf16_for_cpu = False
        block = module.weight.quant_state.blocksize
        if module.in_features % block:  # it would decode them with the scales of other rows
            raise UserError(
                f"load_in_4bit: on a CPU bitsandbytes decodes rows of a multiple of {block} weights only, and {name} "
                f"has {module.in_features}: leave load_in_4bit out, or use a GPU"
            )


def _apply_liger(model: PreTrainedModel) -> None:
    """Liger's layers (norms, rotary embedding, MLP). Not its losses: the head is gem_kernels' matter."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def _load_weights(source: ModelSource, **arguments: Any) -> PreTrainedModel:
    """The model, once every weight of it has come from the file."""
    if source.gguf_file is None:
        named = getattr(arguments["config"], "transformers_weights", None)  # a file that config.json asks for
        check_weights_file(named, source.words)
        index = None
        with contextlib.suppress(OSError):  # a hub that does not answer is told by the loading itself
            name = named or SAFE_WEIGHTS_INDEX_NAME
            index = cached_file(source.name, name, _raise_exceptions_for_missing_entries=False)
        if index is not None and index.endswith(".json"):
            check_index(index, source.words)
    with _QuietTransformers():
        model, info = _load(
            AutoModelForCausalLM,
            source,
            output_loading_info=True,
            ignore_mismatched_sizes=not is_deepspeed_zero3_enabled(),  # `check_loaded` names them
            **arguments,
        )
    check_loaded(info, source.words)
    return model


def _check_model(model: PreTrainedModel, source: ModelSource) -> None:
    if not is_deepspeed_zero3_enabled():  # which holds shares of the weights, and gathers them in its own forward
        check_finite(model.named_parameters(), source.words)
        check_causal(model, source.words)


def _load(loader: Any, source: ModelSource, **arguments: Any) -> Any:
    check_there(source.name)
    try:
        return loader.from_pretrained(source.name, **source.arguments, **arguments)
    except Exception as error:  # foreign files break in any way, struct.error within a cut-off GGUF included
        raise UserError(not_loaded(source.words, error)) from error


def _forget_quantization(model: PreTrainedModel) -> None:
    """A GGUF model is whole floating-point weights once loaded; transformers still marks it quantized, and refuses to
    save it, until that mark is gone."""
    for owner, name in (
        (model, "hf_quantizer"), (model, "quantization_method"), (model, "is_quantized"),
        (model.config, "quantization_config"), (model.config, "_pre_quantization_dtype"),
    ):  # fmt: skip
        if name in vars(owner):
            delattr(owner, name)


class _QuietTransformers:
    """Loading prints a bar per file and per tensor; our own line says what is loaded. Errors still come through, and
    the user's settings come back after."""

    def __enter__(self) -> None:
        self.bar = transformers_logging.is_progress_bar_enabled()
        self.verbosity = transformers_logging.get_verbosity()
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        self.stderr = contextlib.redirect_stderr(io.StringIO())  # the GGUF reader's bar has no switch
        self.stderr.__enter__()

    def __exit__(self, *_: object) -> None:
        self.stderr.__exit__(None, None, None)
        transformers_logging.set_verbosity(self.verbosity)
        if self.bar:
            transformers_logging.enable_progress_bar()
