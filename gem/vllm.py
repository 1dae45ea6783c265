"""Sampling with vLLM: in this process beside the model, or at a server. Not run yet: the tests have no GPU.

Both modes give every candidate its own seed, from the same key that gem.rollout draws from, and return the sampler's
own token ids. They record no entropies: scores then cost one forward without gradient.

colocate: the weights go to the engine in this process before each rollout.
server: `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL` on a machine that sees the same files. Before each rollout the weights
are written to a directory of the run and the server is told to load them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from gem import distributed
from gem.adapters import is_adapted, merged_state_dict
from gem.config import TrainConfig
from gem.errors import UserError
from gem.model import ModelSource
from gem.rollout import SampledTokens, Sampler, Sampling

_TIMEOUT = 600.0  # seconds for one request


def check_vllm(config: TrainConfig, source: ModelSource) -> None:
    """Raises unless the engine that the configuration asks for can be had. Starts nothing."""
    if not config.use_vllm:
        return
    if config.vllm_mode == "server":
        try:
            _request(f"{config.vllm_server_url}/health", timeout=10)
        except UserError as error:
            raise UserError(f"vllm_server_url: {error}; start it with `vllm serve`, or leave use_vllm out") from error
        return
    if importlib.util.find_spec("vllm") is None:
        raise UserError("use_vllm: vllm is not installed: pip install vllm, or leave use_vllm out")
    if source.gguf_file:
        raise UserError("use_vllm: a GGUF file cannot be sampled with vLLM here: give a directory or a hub id")


def make_sampler(config: TrainConfig, source: ModelSource, run_dir: Path) -> Sampler | None:
    """The engine, started; None without `use_vllm`."""
    if not config.use_vllm:
        return None
    return Server(config, run_dir) if config.vllm_mode == "server" else Colocated(config, source)


class Colocated:
    """vLLM's engine in this process, on this process's GPU."""

    def __init__(self, config: TrainConfig, source: ModelSource) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the weights are handed over in this process
        from vllm import LLM

        self.engine = LLM(
            model=source.name,
            dtype=config.dtype,
            gpu_memory_utilization=config.vllm_gpu_memory_utilization,
            distributed_executor_backend="external_launcher" if distributed.world_size() > 1 else None,
            seed=config.seed,
        )

    def update(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        weights = list(policy_weights(model).items())
        self.engine.apply_model(lambda own: own.load_weights(weights))
        self.engine.reset_prefix_cache()  # keys and values of the old weights

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, end_token_ids: Sequence[int], keys: np.ndarray
    ) -> list[SampledTokens]:
        from vllm import SamplingParams

        requests = _requests(prompts, sampling, end_token_ids, keys)
        parameters = [SamplingParams(**fields, detokenize=False) for _, fields in requests]
        prompts_given = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        results = self.engine.generate(prompts_given, parameters, use_tqdm=False)
        return [SampledTokens(list(result.outputs[0].token_ids)) for result in results]


class Server:
    """A vLLM server that sees this machine's files."""

    def __init__(self, config: TrainConfig, run_dir: Path) -> None:
        self.url = config.vllm_server_url.rstrip("/")
        self.directory = (run_dir / "vllm").resolve()
        self.model = _request(f"{self.url}/v1/models")["data"][0]["id"]

    def update(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        from safetensors.torch import save_file

        weights = policy_weights(model)

        def hand_over() -> None:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir()
            save_file({k: v.cpu().contiguous() for k, v in weights.items()}, self.directory / "model.safetensors")
            load = {"method": "reload_weights", "kwargs": {"weights_path": str(self.directory)}}
            _request(f"{self.url}/collective_rpc", load)
            _request(f"{self.url}/reset_prefix_cache", {})

        distributed.on_main(hand_over)

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, end_token_ids: Sequence[int], keys: np.ndarray
    ) -> list[SampledTokens]:
        rows = []
        for prompt, fields in _requests(prompts, sampling, end_token_ids, keys):
            body = {"model": self.model, "prompt": prompt, "return_token_ids": True, **fields}
            choice = _request(f"{self.url}/v1/completions", body)["choices"][0]
            rows.append(SampledTokens(list(choice["token_ids"])))
        return rows


def policy_weights(model: nn.Module) -> dict[str, Any]:
    """The weights under the model's own names, adapters merged, shards gathered, tied weights once."""
    whole = distributed.whole_state_dict(model)
    if is_adapted(model):
        if whole is not None:
            raise UserError("use_vllm: LoRA under FSDP2 cannot be handed to vLLM: launch without --use_fsdp")
        whole = merged_state_dict(model)
    seen: set[int] = set()
    found = {}
    for name, tensor in (model.state_dict() if whole is None else whole).items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            found[name] = tensor.detach()
    return found


def _requests(
    prompts: Sequence[Sequence[int]], sampling: Sampling, end_token_ids: Sequence[int], keys: np.ndarray
) -> list[tuple[list[int], dict[str, Any]]]:
    """(prompt, fields that SamplingParams and the server's completions share) of every candidate."""
    common = {
        "max_tokens": sampling.max_completion_length,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": list(end_token_ids),
    }
    size = sampling.num_generations
    return [(list(prompts[i // size]), {**common, "seed": int(key) & 0x7FFFFFFF}) for i, key in enumerate(keys)]


def _request(url: str, body: dict[str, Any] | None = None, timeout: float = _TIMEOUT) -> Any:
    """GET, or POST of JSON; the answer's JSON, None where it has none."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            text = answer.read()
    except (OSError, ValueError) as error:
        raise UserError(f"no answer from the vLLM server at {url}: {getattr(error, 'reason', error)}") from error
    return json.loads(text) if text else None
