"""Sampling with vLLM: in this process beside the model, or at a server. Run with vLLM 0.32.0 on a CPU; not on a GPU.

Both modes give every candidate its own seed, from the same key that sample.py draws from, and return the sampler's
own token ids. vLLM can tell log-probs of tokens but no entropies, so none are recorded: scores cost one forward without
gradient.

colocate: the weights go to the engine in this process before each rollout.
server: `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --dtype DTYPE --host 127.0.0.1` on a machine that sees the same files
(without --dtype, vLLM rounds float32 to 16 bits; without --host, anyone who reaches the port may call anything in it:
docs/options.md). The key of VLLM_API_KEY goes with every request, to this server alone, and is never printed.
Before each rollout the weights are written to a directory of the run, the server is
told to load them, and the directory is removed. The requests of a rollout are sent together: the server batches them.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from gem import files
from gem.config.settings import Sampling, TrainConfig
from gem.errors import UserError
from gem.model.forward import inner_model
from gem.model.lora import is_adapted, merged_state_dict
from gem.model.source import ModelSource
from gem.parallel import processes
from gem.rollout.sample import SampledTokens, Sampler

_TIMEOUT = 600.0  # seconds for one request
_MOST_REQUESTS = 256  # in flight at once; vLLM's own default of sequences in a batch


def check_vllm(config: TrainConfig, source: ModelSource) -> None:
    """Raises unless the engine that the configuration asks for can be had. Starts nothing."""
    if not config.use_vllm:
        return
    if config.load_in_4bit:
        raise UserError("use_vllm: 4-bit weights cannot be handed to vLLM: leave load_in_4bit or use_vllm out")
    if config.vllm_mode == "server":
        url = config.vllm_server_url.rstrip("/")
        try:
            _request(f"{url}/health", timeout=10)
        except UserError as error:
            raise UserError(f"vllm_server_url: {error}; start it with `vllm serve`, or leave use_vllm out") from error
        try:
            _request(f"{url}/reset_prefix_cache", {}, timeout=60)
        except UserError as error:
            raise UserError(f"vllm_server_url: {error}; start it with VLLM_SERVER_DEV_MODE=1") from error
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
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the weights are handed over in this process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        with _generators_kept():
            try:
                from vllm import LLM

                self.engine = LLM(
                    model=source.name,
                    dtype=config.dtype,
                    gpu_memory_utilization=config.vllm_gpu_memory_utilization,
                    max_model_len=-1,  # the model's own, or what the cache has room for
                    distributed_executor_backend="external_launcher" if processes.world_size() > 1 else None,
                    seed=config.seed,
                )
            except Exception as error:  # a foreign engine fails in many ways
                why = " ".join(str(error).split())[:300]
                raise UserError(f"use_vllm: vLLM cannot start with {source.name}: {why}") from error
        _end_with_the_group(self.engine)

    def update(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        weights = list(policy_weights(model).items())
        with _generators_kept():
            # Not the model's own load_weights: the layers may hold their weights in another layout by now.
            self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if self.engine.reset_prefix_cache() is False:  # keys and values of the old weights
            raise UserError("use_vllm: vLLM kept the keys and values of the weights before: it still runs requests")

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, end_token_ids: Sequence[int], keys: np.ndarray
    ) -> list[SampledTokens]:
        from vllm import SamplingParams

        needed = max(map(len, prompts)) + sampling.max_completion_length
        room = self.engine.model_config.max_model_len
        if needed > room:
            raise UserError(
                f"vllm_gpu_memory_utilization: prompt and completion take up to {needed} tokens, vLLM has room for "
                f"{room}: raise it, or lower max_completion_length"
            )
        requests = _requests(prompts, sampling, end_token_ids, keys)
        parameters = [SamplingParams(**fields, detokenize=False) for _, fields in requests]
        prompts_given = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        with _generators_kept():
            results = self.engine.generate(prompts_given, parameters, use_tqdm=False)
        return [SampledTokens(list(result.outputs[0].token_ids)) for result in results]


class Server:
    """A vLLM server that sees this machine's files."""

    def __init__(self, config: TrainConfig, run_dir: Path) -> None:
        self.url = config.vllm_server_url.rstrip("/")
        self.run_dir = run_dir.resolve()
        self.updates = 0
        self.vocabulary: int | None = None  # of the model that it was last given
        url = f"{self.url}/v1/models"
        self.model = _part(url, _request(url), "data", 0, "id")

    def update(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        weights = policy_weights(model, main_alone=True)
        self.vocabulary = inner_model(model).config.get_text_config().vocab_size
        self.updates += 1
        directory = self.run_dir / f"vllm-{self.updates}"  # a new name: a network file system may remember the last

        def hand_over() -> None:
            # A copy of each: a file cannot hold tied weights that are one tensor.
            files.save_tensors(directory, {name: value.to("cpu", copy=True) for name, value in weights.items()})
            try:
                load = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
                _request(f"{self.url}/collective_rpc", load)
                self.reset_prefix_cache()
            finally:
                shutil.rmtree(directory, ignore_errors=True)

        processes.on_main(hand_over)

    def reset_prefix_cache(self) -> None:
        """Drops the keys and values of the old weights, which vLLM refuses to do while requests run."""
        url = f"{self.url}/reset_prefix_cache"
        for _ in range(20):
            answer = _request(url, {})
            if answer is None or _part(url, answer, "success"):
                return
            time.sleep(0.5)
        raise UserError(f"the vLLM server at {self.url} is busy: no other client may use it during a run")

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, end_token_ids: Sequence[int], keys: np.ndarray
    ) -> list[SampledTokens]:
        requests = _requests(prompts, sampling, end_token_ids, keys)
        with ThreadPoolExecutor(min(len(requests), _MOST_REQUESTS)) as pool:
            rows = [pool.submit(self._complete, prompt, fields) for prompt, fields in requests]
            try:
                return [row.result() for row in rows]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _complete(self, prompt: list[int], fields: dict[str, Any]) -> SampledTokens:
        url = f"{self.url}/v1/completions"
        answer = _request(url, {"model": self.model, "prompt": prompt, "return_token_ids": True, **fields})
        reason = _part(url, answer, "choices", 0, "finish_reason")
        if reason not in ("stop", "length"):
            raise UserError(f"the vLLM server at {url} did not finish a completion: {reason}")
        ids = _part(url, answer, "choices", 0, "token_ids")
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise UserError(f"the vLLM server at {url} gave no token_ids; it may be too old")
        if not ids or len(ids) > fields["max_tokens"]:
            raise UserError(
                f"the vLLM server at {url} gave {len(ids)} tokens, expected 1 to {fields['max_tokens']}; is it vLLM?"
            )
        last = self.vocabulary if self.vocabulary is not None else 1 << 31
        if bad := [token for token in ids if not 0 <= token < last]:
            raise UserError(
                f"the vLLM server at {url} gave the token {str(bad[0])[:20]}, which is none of the {last} of the "
                "model; start it with the model of this run"
            )
        if reason == "stop" and ids[-1] not in fields["stop_token_ids"]:
            raise UserError(
                f"the vLLM server at {url} stopped a completion at the token {ids[-1]}, which is no end token of this "
                "run; start it without a generation config of its own (--generation-config vllm)"
            )
        if reason == "length" and len(ids) < fields["max_tokens"]:  # it lowers max_tokens without a word
            raise UserError(
                f"the vLLM server at {url} has room for {len(ids)} tokens after a prompt of {len(prompt)}, not for "
                f"{fields['max_tokens']}: raise its --max-model-len, or lower max_completion_length"
            )
        return SampledTokens(ids)


def policy_weights(model: nn.Module, *, main_alone: bool = False) -> dict[str, Tensor]:
    """The weights under the names of a checkpoint, whole, adapters merged. A collective if sharded.

    Tied weights stand under each of their names: on a CPU, vLLM's head keeps a copy in a layout of its own, which only
    a weight of its own name replaces. `main_alone`: the other processes need not have those of a sharded model.
    """
    sharded = processes.is_sharded(model)
    if is_adapted(model):
        if sharded:
            raise UserError("use_vllm: LoRA in sharded weights cannot be handed over: launch without FSDP2 and ZeRO 3")
        return revert_weight_conversion(model.get_base_model(), merged_state_dict(model))
    if sharded and main_alone:
        state = processes.whole_state_dict(model)
        if not processes.is_main():
            return {}
    else:
        parameters = dict(model.named_parameters(remove_duplicate=False))  # a state dict has no handle on ZeRO's shares
        state = {
            name: processes.whole_tensor(parameters.get(name, value)) for name, value in model.state_dict().items()
        }
    return revert_weight_conversion(model, state)


def _requests(
    prompts: Sequence[Sequence[int]], sampling: Sampling, end_token_ids: Sequence[int], keys: np.ndarray
) -> list[tuple[list[int], dict[str, Any]]]:
    """(prompt, fields that SamplingParams and the server's completions share) of every candidate."""
    common = {
        "max_tokens": sampling.max_completion_length,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": list(end_token_ids),
        "ignore_eos": True,  # end tokens are ours alone, not also those that vLLM finds beside the model
    }
    size = sampling.num_generations
    seeds = [int(key) & 0x7FFF_FFFF_FFFF_FFFF for key in keys]  # an int64, not negative
    return [(list(prompts[i // size]), {**common, "seed": seed}) for i, seed in enumerate(seeds)]


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """vLLM seeds and draws from this process's generators, on which the rest of the run depends."""
    state = processes.random_state()
    try:
        yield
    finally:
        processes.restore_random_state(state)


def _end_with_the_group(engine: Any) -> None:
    """At exit vLLM leaves its process groups, with a traceback where gem has left them all before."""
    finalizer = getattr(engine.llm_engine.engine_core, "_finalizer", None)
    if finalizer is not None:
        finalizer.atexit = False
        atexit.register(lambda: finalizer() if dist.is_initialized() else None)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A server of ours sends no one elsewhere: the key would go with the request."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _headers() -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        if not re.fullmatch(r"[!-~]+", key):
            raise UserError("VLLM_API_KEY: holds spaces or other characters that no key may; set it again")
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _request(url: str, body: dict[str, Any] | None = None, timeout: float = _TIMEOUT) -> Any:
    """GET, or POST of JSON; the answer's JSON, None where it has none."""
    data = None if body is None else json.dumps(body).encode()
    headers = _headers()
    try:
        request = urllib.request.Request(url, data, headers)
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        words = f"the vLLM server refused {url}: {error.code} {_reason(error)}"
        if error.code in (401, 403):
            words += "; set VLLM_API_KEY to the key that it was started with"
        raise UserError(words) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"no answer from the vLLM server at {url}: {getattr(error, 'reason', error)}") from error
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the vLLM server at {url} did not answer in JSON; is it one?") from error


def _reason(error: urllib.error.HTTPError) -> str:
    """What vLLM says about a refused request, in one line; else HTTP's own word for it."""
    try:
        words = str(json.loads(error.read())["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        words = str(error.reason)
    return " ".join(words.split())[:300]


def _part(url: str, answer: Any, *path: str | int) -> Any:
    """answer[path[0]][path[1]]..."""
    for key in path:
        try:
            answer = answer[key]
        except (KeyError, IndexError, TypeError) as error:
            name = ".".join(map(str, path))
            raise UserError(f"the vLLM server at {url} answered without {name}; is it one?") from error
    return answer
