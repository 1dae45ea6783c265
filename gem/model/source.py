"""Where a model is, by its name: looked up before torch and transformers are imported, so a mistake costs nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gem.errors import UserError, path_of

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class ModelSource:
    """Where `from_pretrained` finds a model: its first argument, the file within it where it is a GGUF, and the
    directory of the LoRA adapter that goes on it."""

    name: str
    gguf_file: str | None
    adapter: str | None = None

    @property
    def words(self) -> str:
        """What a message calls it."""
        return self.name if self.gguf_file is None else str(Path(self.name) / self.gguf_file)

    @property
    def arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"trust_remote_code": False}
        if self.gguf_file:
            arguments["gguf_file"] = self.gguf_file
        return arguments


def find_model(model: str) -> ModelSource:
    """A GGUF file, a directory (of transformers, of a LoRA adapter, or holding one GGUF file), else a hub id."""
    path = path_of(model, "model")
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(f"model: {model}: expected a directory or a .gguf file")
        return ModelSource(str(path.parent), path.name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return ModelSource(str(path), None)
        if (path / ADAPTER_CONFIG).is_file():
            return replace(_base_of_adapter(path), adapter=str(path))
        inside = path / "model"
        if (inside / "config.json").is_file() or (inside / ADAPTER_CONFIG).is_file():
            raise UserError(f"model: {model} is the directory of a run; did you mean {inside}?")
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        if len(ggufs) != 1:
            what = f"{len(ggufs)} .gguf files; name one of them" if ggufs else "neither config.json nor a .gguf file"
            raise UserError(f"model: {model}: the directory holds {what}")
        return ModelSource(str(path), ggufs[0])
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or model.endswith(".gguf"):
        raise UserError(f"model: {model}: no such file or directory")
    return ModelSource(model, None)


def _base_of_adapter(path: Path) -> ModelSource:
    name = read_adapter_config(path)["base_model_name_or_path"]
    base = path_of(name, f"model: {path / ADAPTER_CONFIG}")
    if (base / ADAPTER_CONFIG).is_file() and not (base / "config.json").is_file():
        what = "this adapter itself" if base.resolve() == path.resolve() else f"another adapter, {name}"
        raise UserError(f"model: {path / ADAPTER_CONFIG}: base_model_name_or_path names {what}; expected a whole model")
    return find_model(name)


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter whose weights are safetensors; anything else is refused."""
    try:
        config = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model: {directory / ADAPTER_CONFIG}: cannot read it: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("base_model_name_or_path"), str):
        raise UserError(f"model: {directory / ADAPTER_CONFIG}: base_model_name_or_path is missing")
    if config.get("peft_type") != "LORA":
        raise UserError(f"model: {directory}: expected a LoRA adapter, got {config.get('peft_type')}")
    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"model: {directory}: {ADAPTER_WEIGHTS} is missing (weights are read from safetensors only)")
    return config
