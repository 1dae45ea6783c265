"""Loading and saving: a local directory, a GGUF file or a hub id in; a directory of safetensors out.

No code from a model repository is ever run (`trust_remote_code=False`) and no pickle is opened.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from gem.errors import UserError


@dataclass(frozen=True)
class ModelSource:
    """Where `from_pretrained` finds a model: its first argument, and the file within it where it is a GGUF."""

    name: str
    gguf_file: str | None

    @property
    def arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"trust_remote_code": False}
        if self.gguf_file:
            arguments["gguf_file"] = self.gguf_file
        return arguments


def find_model(model: str) -> ModelSource:
    """A GGUF file, a directory (of transformers, or holding one GGUF file), else a hub id."""
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(f"model: {model}: expected a directory or a .gguf file")
        return ModelSource(str(path.parent), path.name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return ModelSource(str(path), None)
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        if len(ggufs) != 1:
            what = f"{len(ggufs)} .gguf files; name one of them" if ggufs else "neither config.json nor a .gguf file"
            raise UserError(f"model: {model}: the directory holds {what}")
        return ModelSource(str(path), ggufs[0])
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or model.endswith(".gguf"):
        raise UserError(f"model: {model}: no such file or directory")
    return ModelSource(model, None)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    with _QuietTransformers():
        tokenizer = _load(AutoTokenizer, source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked everywhere, so its value never matters
    return tokenizer


def load_config(source: ModelSource) -> PreTrainedConfig:
    """The model's configuration, without its weights."""
    with _QuietTransformers():
        return _load(AutoConfig, source)


def context_length(config: PreTrainedConfig) -> int | None:
    """Positions the model was made for, None where its configuration does not say."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)


def load_model(
    source: ModelSource, config: PreTrainedConfig, dtype: str = "float32", device: str = "auto"
) -> PreTrainedModel:
    """The causal language model in `dtype`, in eval mode, with plain trainable weights, GGUF or not."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    extra = {} if source.gguf_file else {"use_safetensors": True}
    with _QuietTransformers():
        model = _load(AutoModelForCausalLM, source, config=config, dtype=getattr(torch, dtype), **extra)
    if source.gguf_file:
        _forget_quantization(model)
    try:
        return model.to(device).eval()
    except RuntimeError as error:
        raise UserError(f"device: cannot use {device!r}: {_one_line(error)}") from error


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *more: int) -> tuple[int, ...]:
    """Every token that ends an answer: of the generation config (one or a list), model, tokenizer, and `more`."""
    found: set[int] = set(more)
    for eos in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        if eos is not None:
            found.update([eos] if isinstance(eos, int) else eos)
    return tuple(sorted(found))


def save_pretrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Writes weights (safetensors), configuration and tokenizer; `AutoModelForCausalLM.from_pretrained` opens it."""
    with _QuietTransformers():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def _load(loader: Any, source: ModelSource, **arguments: Any) -> Any:
    try:
        return loader.from_pretrained(source.name, **source.arguments, **arguments)
    except Exception as error:  # foreign files break in any way, struct.error within a cut-off GGUF included
        raise UserError(f"model: cannot load {source.gguf_file or source.name}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + "..."


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
