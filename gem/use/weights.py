"""`gem merge` and `gem push`: a LoRA adapter into its model, and a model's directory to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console

from gem.config.settings import TextSettings
from gem.errors import UserError, one_line
from gem.files import write_directory
from gem.model import load
from gem.model.checks import http_error
from gem.model.opened import open_text
from gem.model.source import find_model

# What a directory of a model may hold that belongs on the hub: no checkpoints, logs or rows.
_PUSHED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*")


def merge_adapter(adapter: str, out: Path, dtype: str, console: Console) -> Path:
    """A whole model of `dtype` in `out`: W + (lora_alpha / lora_r) B A on every target, and the adapter's tokenizer."""
    source = find_model(adapter)
    if source.adapter is None:
        raise UserError(f"model: {adapter} is no LoRA adapter but a whole model: there is nothing to merge")
    form, config = open_text(source, TextSettings())
    console.print(f"Loading {source.name} and {source.adapter}", highlight=False)
    model = load.load_model(source, config, dtype, "cpu")
    write_directory(out, lambda part: load.save_pretrained(model, form.tokenizer, part), f"--out: cannot write {out}")
    return out


def push_model(model: str, repo: str, private: bool, console: Console) -> str:
    """Uploads weights, configuration and tokenizer of a local directory; the address of the repository.

    The key is huggingface_hub's own (`hf auth login`, or HF_TOKEN), which nothing prints.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"REPO: expected OWNER/NAME, got {repo!r}")
    source = find_model(model)
    folder = Path(source.adapter or source.name)
    if not folder.is_dir() or source.gguf_file:
        raise UserError(f"model: {model}: expected the directory of a model or an adapter, as in RUN/model")
    api = HfApi()
    try:
        console.print(f"Uploading {folder} to {repo}", highlight=False)
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=list(_PUSHED))
    except LocalTokenNotFoundError as error:
        raise UserError(f"push: no key of the hub here: run hf auth login, or set HF_TOKEN ({repo})") from error
    except HFValidationError as error:
        raise UserError(f"REPO: {one_line(error)}") from error
    except HfHubHTTPError as error:
        hint = "; run hf auth login with a key that may write" if "401" in str(error) or "403" in str(error) else ""
        raise UserError(f"push: the hub refused {repo}: {one_line(error)}{hint}") from error
    except (OSError, http_error()) as error:  # no network among them
        raise UserError(f"push: no answer from the hub: {one_line(error)}; look at the network, try again") from error
    return f"https://huggingface.co/{repo}"
