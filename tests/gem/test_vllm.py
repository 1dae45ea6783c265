"""Sampling with vLLM, where it is installed: its engine in this process, and its server.

Greedy completions must be those of transformers with the same weights: that shows whether new weights arrived, all of
them, and whether keys and values of the old ones are gone.
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from rich.console import Console

from gem.config.settings import Sampling, TextSettings
from gem.data.prompts import text_format
from gem.errors import UserError
from gem.loop import train
from gem.model.forward import Policy
from gem.model.source import find_model
from gem.rollout.sample import roll_out, row_keys
from gem.rollout.vllm import Colocated, Server, check_vllm
from tests.gem.vllm_data import (
    PROMPTS,
    bare_settings,
    fill_folder,
    server_fields,
    server_settings,
    settings,
    small_model,
    with_adapter,
)
from tests.helpers import tiny_tokenizer

# Tests of vLLM itself; it has kernels for heads of 32 and more.
with_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")

GREEDY = Sampling(num_generations=1, max_completion_length=12, temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill_folder(tmp_path_factory.mktemp("gem"))


def completions(run_dir):
    return [json.loads(line)["completion"] for line in (run_dir / "completions.jsonl").read_text().splitlines()]


def greedy(model, ends=()):
    """transformers' own completions of PROMPTS, cut after the first token of `ends`."""
    rows = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(GREEDY.max_completion_length):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in ends:
                break
        rows.append(ids[len(prompt) :])
    return rows


def sampled(sampler, sampling=GREEDY, ends=(), seed=0, prompts=range(3)):
    keys = row_keys(seed, 0, prompts, sampling.num_generations)
    return [row.ids for row in sampler.sample([PROMPTS[i] for i in prompts], sampling, ends, keys)]


def check_weights(sampler):
    """What the sampler says before any update, and after updates to other, adapted and the first weights again."""
    old, new = small_model(0), small_model(1)
    assert greedy(old) != greedy(new)
    assert sampled(sampler) == greedy(old)
    for model in (new, with_adapter(small_model(0)), with_adapter(small_model(1)), old):
        expected = greedy(model)
        sampler.update(model, tiny_tokenizer())
        assert sampled(sampler) == expected
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.zero_()  # the engine holds weights of its own
    assert sampled(sampler) == greedy(small_model(0))


def check_ends(sampler):
    """Completions are cut after our end tokens, which they keep, and at no other token; what was cut off is marked."""
    model = small_model(0)
    whole = greedy(model)
    end = whole[0][4]
    cut = greedy(model, (end,))
    assert [len(row) for row in cut] != [len(row) for row in whole] and end not in whole[1]
    assert sampled(sampler, ends=(end,)) == cut
    assert cut[0][-1] == end
    form = dataclasses.replace(text_format(tiny_tokenizer(), TextSettings(answer_marker="A:")), end_tokens=(end,))
    rollout = roll_out(
        Policy(model), form, PROMPTS, GREEDY, seed=0, batch_size=2, stats_temperature=1.0, sampler=sampler
    )
    assert rollout.truncated.tolist() == [row[-1] != end for row in cut] and not rollout.truncated[0]
    mask = rollout.batch.completion_mask
    assert [ids[m].tolist() for ids, m in zip(rollout.batch.completion_ids, mask)] == cut
    assert rollout.logprobs is None and rollout.entropy is None
    # A token that the model's files call the end is one among others unless it is ours.
    eos = tiny_tokenizer().eos_token_id
    forced = small_model(0)
    with torch.no_grad():
        forced.model.norm.weight.zero_()  # all logits are equal: every token comes
    sampler.update(forced, tiny_tokenizer())
    many = Sampling(num_generations=4, max_completion_length=200)
    rows = sampled(sampler, many)
    assert any(eos in row[:-1] for row in rows) and all(len(row) == 200 for row in rows)
    sampler.update(small_model(0), tiny_tokenizer())


def check_seeds(sampler):
    """A candidate is a function of its key, whatever it is sampled with."""
    warm = Sampling(num_generations=2, max_completion_length=12)
    rows = sampled(sampler, warm, seed=1)
    assert sampled(sampler, warm, seed=1) == rows
    assert sampled(sampler, warm, seed=1, prompts=[1]) == rows[2:4]
    assert len({tuple(row) for row in rows}) == 6
    assert not {tuple(row) for row in rows} & {tuple(row) for row in sampled(sampler, warm, seed=2)}
    narrow = Sampling(num_generations=2, max_completion_length=12, top_k=1)
    assert sampled(sampler, narrow, seed=3) == [row for row in greedy(small_model(0)) for _ in range(2)]


_COLOCATED = []  # the engine of a process that has one


def start_colocated(model):
    """The engine, which must leave this process's random numbers as they were."""
    torch.manual_seed(7)
    np.random.seed(7)
    expected = torch.rand(3).tolist(), np.random.rand(3).tolist()
    torch.manual_seed(7)
    np.random.seed(7)
    _COLOCATED.append(Colocated(bare_settings(use_vllm=True), find_model(model)))
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist()) == expected


def in_colocated(check):
    check(_COLOCATED[0])


def check_generators(sampler):
    model = small_model(0)
    before = torch.get_rng_state()
    sampler.update(model, tiny_tokenizer())
    sampled(sampler, Sampling(num_generations=2, max_completion_length=12))
    assert torch.equal(before, torch.get_rng_state())


def check_room(sampler):
    with pytest.raises(UserError, match="up to 800 tokens, vLLM has room for 512"):
        sampled(sampler, Sampling(num_generations=1, max_completion_length=500))


def vllm_environment():
    """Without the interpreter of our own kernels, and with a small cache on a CPU."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def colocated(folder):
    """A process with the engine in it: vLLM changes the process that it runs in."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in vllm_environment().items():
            patch.setenv(name, value)
        patch.delenv("TRITON_INTERPRET", raising=False)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(start_colocated, str(folder / "model")).result(timeout=600)
            yield pool


@with_vllm
@pytest.mark.parametrize("check", [check_weights, check_ends, check_seeds, check_generators, check_room])
def test_the_engine_in_this_process(colocated, check):
    colocated.submit(in_colocated, check).result(timeout=600)


@pytest.fixture(scope="module")
def vllm_server(folder):
    """The URL of vLLM's server of the model."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # `vllm serve` by its module: the CPU's wheel has another name, by which the command does not find itself.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
    flags = ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port), "--gpu-memory-utilization", "0.2"]
    url = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("w") as log:
        environment = {**vllm_environment(), "VLLM_SERVER_DEV_MODE": "1"}
        process = subprocess.Popen([*command, *flags], env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for_server(url, process, folder / "server.log")
            yield url
        finally:
            process.terminate()
            process.wait(timeout=60)


def wait_for_server(url, process, log):
    for _ in range(600):
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{url}/health", timeout=10):
            return
        assert process.poll() is None, log.read_text()[-5000:]
        time.sleep(1)
    pytest.fail(f"no server after ten minutes: {log.read_text()[-5000:]}")


@with_vllm
@pytest.mark.parametrize("check", [check_weights, check_ends, check_seeds])
def test_vllms_server(vllm_server, folder, check):
    (folder / "files").mkdir(exist_ok=True)
    check_vllm(server_settings(vllm_server), find_model(str(folder / "model")))
    sampler = Server(server_settings(vllm_server), folder / "files")
    sampler.update(small_model(0), tiny_tokenizer())
    check(sampler)
    assert list((folder / "files").iterdir()) == []


@with_vllm
def test_vllms_server_has_too_little_room(vllm_server, folder):
    sampler = Server(server_settings(vllm_server), folder)
    with pytest.raises(UserError, match="has room for 212 tokens after a prompt of 300, not for 500"):
        sampled(sampler, Sampling(num_generations=1, max_completion_length=500))
    with pytest.raises(UserError, match=r"/v1/completions: 400 .*max_model_len"):
        sampled(sampler, Sampling(num_generations=1, max_completion_length=600))


@with_vllm
def test_vllms_server_names_what_it_refuses(vllm_server, folder):
    sampler = Server(server_settings(vllm_server), folder)
    sampler.model = "another"
    with pytest.raises(UserError, match=r"/v1/completions: 404 .*does not exist"):
        sampled(sampler)


@pytest.fixture(scope="module")
def own_samples(folder):
    """Greedy completions of a run whose model samples by itself; after SFT, so not those of the first weights."""
    found = completions(train(settings(folder, "own", temperature=0.0), Console(file=io.StringIO())).run_dir)
    without = train(settings(folder, "no_sft", temperature=0.0, sft_epochs=0), Console(file=io.StringIO()))
    assert found != completions(without.run_dir)
    return found


@with_vllm
def test_a_run_with_the_engine_samples_what_its_model_would(folder, own_samples):
    config = settings(folder, "colocated", temperature=0.0, use_vllm=True)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(run_alone, config).result(timeout=600)
    assert completions(folder / "colocated") == own_samples


@with_vllm
def test_a_run_with_a_server_samples_what_its_model_would(folder, vllm_server, own_samples):
    run = train(settings(folder, "served", temperature=0.0, **server_fields(vllm_server)), Console(file=io.StringIO()))
    assert completions(run.run_dir) == own_samples


def run_alone(config):
    os.environ.update(vllm_environment())
    train(config, Console(file=io.StringIO()))
