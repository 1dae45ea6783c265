"""A model that is used, not trained: given by name, or as objects that are there."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from gem.config.settings import TextSettings
from gem.data.prompts import TextFormat, text_format
from gem.errors import UserError
from gem.model import load
from gem.model.checks import check_vocabulary
from gem.model.forward import Policy, inner_model
from gem.model.source import ModelSource, find_model

# A name, or (model, tokenizer).
ModelLike = str | Path | tuple[nn.Module, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class OpenedModel:
    """What is known before the weights are loaded: `policy` loads them."""

    name: str
    form: TextFormat
    context: int | None  # positions
    model: nn.Module | ModelSource

    def policy(self, device: str = "auto", dtype: str = "float32") -> tuple[Policy, TextFormat]:
        """(the policy; its text format with all end tokens). dtype: float32, bfloat16, or auto (`own_dtype`).

        A model given as an object stays where it is, in its dtype.
        """
        model = self.model
        if isinstance(model, ModelSource):
            config, device = load.load_model_config(model), load.find_device(device)
            model = load.load_model(model, config, own_dtype(config, device) if dtype == "auto" else dtype, device)
        ends = load.end_token_ids(inner_model(model), self.form.tokenizer, self.form.end_of_turn)
        return Policy(model), dataclasses.replace(self.form, end_tokens=ends)


def open_model(model: ModelLike, text: TextSettings) -> OpenedModel:
    """A model by its name (a directory, a GGUF file, a hub id), or (model, tokenizer) as objects."""
    if not isinstance(model, tuple | list):
        name = model_name(model)
        source = find_model(name)
        form, config = open_text(source, text)
        return OpenedModel(name, form, load.context_length(config), source)
    if len(model) != 2 or not isinstance(model[0], nn.Module) or not isinstance(model[1], PreTrainedTokenizerBase):
        got = ", ".join(type(part).__name__ for part in model)
        raise UserError(f"model: expected a name, or (model, tokenizer) of transformers, got ({got})")
    network, tokenizer = model
    if tokenizer.pad_token_id is None:
        raise UserError("model: the tokenizer has no pad_token; set tokenizer.pad_token = tokenizer.eos_token")
    config = inner_model(network).config
    name = str(getattr(config, "_name_or_path", "") or type(network).__name__)
    check_vocabulary(tokenizer, config, name)
    return OpenedModel(name, text_format(tokenizer, text), load.context_length(config), network)


def own_dtype(config: PreTrainedConfig, device: str) -> str:
    """bfloat16 on CUDA where the model's config.json says so, else float32."""
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return "bfloat16" if device.startswith("cuda") and own in (torch.bfloat16, "bfloat16") else "float32"


def open_text(source: ModelSource, text: TextSettings) -> tuple[TextFormat, PreTrainedConfig]:
    """What is known of a model without its weights: the format of its text, and its configuration."""
    tokenizer, config = load.load_tokenizer(source), load.load_model_config(source)
    check_vocabulary(tokenizer, config, source.words)
    return text_format(tokenizer, text), config


def model_name(model: Any) -> str:
    """A name or a path as a string; `UserError` for anything else."""
    if not isinstance(model, str) and not hasattr(model, "__fspath__"):
        raise UserError(f"model: expected a name, or (model, tokenizer) of transformers, got {type(model).__name__}")
    return str(model)
