"""What is loaded is what was named: every weight is there and finite, and the model is a causal language model."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gem.errors import UserError, one_line

_LISTED = 3  # names of tensors in a message
# Of the logits' spread, by which they may change where a later token does: rounding, in mixtures of experts too.
_CAUSAL = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def check_index(path: str | Path, name: str) -> None:
    """path: of a `model.safetensors.index.json`. Raises where it names anything but safetensors beside it: transformers
    would open what it names, pickles too."""
    try:
        names = set(json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values())
        odd = [file for file in names if Path(file).name != file or Path(file).suffix != ".safetensors"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = " ".join(str(error).split())[:100]
        raise UserError(
            f"model: {name}: {Path(path).name} is no index of weights ({why}); get the model again"
        ) from error
    if odd:
        raise UserError(
            f"model: {name}: {Path(path).name} names {some_of(odd)}: weights are read from .safetensors files of the "
            "model's own directory only"
        )


def check_weights_file(file: str | None, name: str) -> None:
    """file: `transformers_weights` of config.json, where it has that. Raises unless it is safetensors beside it."""
    suffixes = (".safetensors", ".safetensors.index.json")
    if file is not None and not (isinstance(file, str) and Path(file).name == file and file.endswith(suffixes)):
        raise UserError(f"model: {name}: config.json: transformers_weights: expected a .safetensors file, got {file!r}")


def check_loaded(info: Mapping[str, Any], name: str) -> None:
    """info: transformers' account of a loading. Without this check, what a file lacks is drawn at random in silence.

    Weights that share one tensor (a tied head) need not be in the file, and transformers does not count them.
    """
    shapes = [f"{key} {list(there)} for {list(here)}" for key, there, here in info.get("mismatched_keys", ())]
    faults = (
        ("missing", info.get("missing_keys", ())),
        ("of another shape", shapes),
        ("no part of the model", info.get("unexpected_keys", ())),
    )
    found = [f"{what}: {some_of(keys)}" for what, keys in faults if keys]
    if found:
        raise UserError(
            f"model: {name}: its weights are not those that its configuration describes; {'; '.join(found)}; "
            "get the model again, or correct its config.json"
        )


def some_of(names: Collection[str]) -> str:
    """The first names, and how many more."""
    listed = sorted(names)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str) -> None:
    """Raises where the tokenizer has ids for which the embeddings have no row."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if isinstance(rows, int) and largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"model: {name}: the tokenizer has ids up to {largest} ({token!r}), the model embeddings for {rows} tokens "
            "alone: take the tokenizer that belongs to it, or save the model after resize_token_embeddings"
        )


@torch.no_grad()
def check_finite(parameters: Iterable[tuple[str, nn.Parameter]], name: str) -> None:
    """Raises at the first weight with NaN or infinity in it: everything that is computed from it would be NaN."""
    for key, parameter in parameters:
        # The sum alone reads all of it once; of large numbers it may overflow.
        if parameter.is_floating_point() and not parameter.sum().isfinite() and not parameter.isfinite().all():
            bad = int((~parameter.isfinite()).sum())
            raise UserError(
                f"model: {name}: {bad} of {parameter.numel()} numbers of {key} are NaN or infinite; "
                "take an earlier checkpoint, or get the model again"
            )


@torch.no_grad()
def check_causal(model: PreTrainedModel, name: str) -> None:
    """Two forwards of four tokens: raises where the model cannot be run, or sees tokens that come later."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 0]], dtype=torch.int64, device=model.device) % vocabulary
    try:
        logits = [model(input_ids=row[None], use_cache=False).logits[0, :-1].float() for row in tokens]
    except Exception as error:  # a model of a foreign file can fail in any way
        words = " ".join(str(error).split())[:300] or type(error).__name__
        attention = model.config._attn_implementation
        raise UserError(f"model: {name} cannot be run ({attention} attention): {words}") from error
    apart, spread = logits[0] - logits[1], logits[0] - logits[0].mean(-1, keepdim=True)
    if apart.norm() > _CAUSAL.get(model.dtype, 5e-2) * spread.norm():
        raise UserError(
            f"model: {name}: expected a causal language model, got {model.config.model_type}, whose logits depend on "
            "tokens that come later: an encoder cannot generate"
        )


def check_there(name: str) -> None:
    """Raises where the name is neither a path here nor known to the hub: one request, and none of what is cached.

    Loading asks twelve times before it says so. Any other answer is left to it.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        if not Path(name).exists() and not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=10)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise UserError(not_loaded(name, error)) from error
    except OSError:  # refused, offline by setting, a failure of the hub's own
        return
    except http_error() as error:
        raise UserError(not_loaded(name, error)) from error


def http_error() -> type[Exception]:
    """What no connection is to huggingface_hub, no OSError: of httpx, of httpx2, whatever its version is made with."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def not_loaded(name: str, error: Exception) -> str:
    """One line on a model that cannot be loaded, and why."""
    if Path(name).exists():
        return f"model: cannot load {name}: {one_line(error)}"
    return f"model: no file or directory {name} here, and as a hub id it cannot be loaded: {one_line(error)}"
