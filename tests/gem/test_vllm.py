"""Sampling with vLLM: against a stand-in of its server, and, where vllm is installed, the engine and server themselves.

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
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gem.config.read import build_config
from gem.config.settings import Lora, Sampling, TextSettings
from gem.data.prompts import text_format
from gem.demo.arithmetic import arithmetic_pairs
from gem.errors import UserError
from gem.files import write_jsonl
from gem.loop import train
from gem.model.forward import Policy
from gem.model.lora import add_lora
from gem.model.source import ModelSource, find_model
from gem.rollout.sample import roll_out, row_keys
from gem.rollout.vllm import Colocated, Server, check_vllm, policy_weights
from tests.helpers import tiny_model, tiny_tokenizer

# Tests of vLLM itself; it has kernels for heads of 32 and more.
with_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")

SAMPLING = Sampling(num_generations=2, max_completion_length=6, temperature=0.7, top_p=0.9, top_k=20, min_p=0.01)
GREEDY = Sampling(num_generations=1, max_completion_length=12, temperature=0.0)
PROMPTS = [[1, 2, 3], [7, 8, 9, 10], [5] * 300]  # the last fills blocks of the prefix cache
RUN = {
    "num_generations": 2, "max_completion_length": 10, "max_steps": 2, "prompts_per_step": 4, "micro_batch_size": 2,
    "sft_epochs": 2, "sft_batch_size": 4, "sft_learning_rate": 3e-3, "learning_rate": 1e-3, "eval_generate": 0,
    "eval_sample": 2, "system_prompt": "Think.", "device": "cpu", "log_completions_steps": 1,
}  # fmt: skip


def small_model(seed=0, tied=True):
    """Like helpers', with a head that vLLM has kernels for."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=272, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=tied, initializer_range=0.3,
        bos_token_id=None, eos_token_id=tiny_tokenizer().eos_token_id, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def with_adapter(model, seed=0):
    """The model under a LoRA adapter that changes it."""
    torch.manual_seed(seed)
    adapted = add_lora(model, Lora(lora_r=4, lora_target_modules="q_proj,down_proj")).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return adapted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model directory and a pairs file."""
    folder = tmp_path_factory.mktemp("gem")
    small_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(16))
    return folder


def settings(folder, name, **more):
    paths = {"model": folder / "model", "train_file": folder / "pairs.jsonl", "output_dir": folder / name}
    return build_config({**RUN, **{key: str(path) for key, path in paths.items()}, **more})


def server_fields(url):
    return {"use_vllm": True, "vllm_mode": "server", "vllm_server_url": url}


def server_settings(url):
    return bare_settings(**server_fields(url))


def bare_settings(**fields):
    """A configuration of which nothing but these is looked at."""
    return build_config({"model": "m", "train_file": "f", "output_dir": "o", **fields})


def completions(run_dir):
    return [json.loads(line)["completion"] for line in (run_dir / "completions.jsonl").read_text().splitlines()]


class StandIn(ThreadingHTTPServer):
    """Answers as vLLM's server does. A completion's ids are its seed's digits; weights are those last loaded."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.seen = []  # (path, body), in order
        self.weights = []  # (directory's name, its tensors) of each reload
        self.instead = {}  # path -> (status, text) of answers to give in place of vLLM's, one after the other
        self.together = None  # a barrier for completions

    def ids(self, body):
        return [int(digit) for digit in str(body["seed"])][: body["max_tokens"]]

    def answer(self, path, body):
        if path == "/v1/models":
            return {"data": [{"id": "served", "max_model_len": 512}]}
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == "/collective_rpc":
            directory = Path(body["kwargs"]["weights_path"])
            self.weights.append((directory.name, load_file(directory / "model.safetensors")))
            return {"results": [None]}
        if path == "/v1/completions":
            if self.together is not None:
                self.together.wait(timeout=30)
            return {"choices": [{"text": "", "finish_reason": "length", "token_ids": self.ids(body)}]}
        return None


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(None)

    def do_POST(self):
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body):
        self.server.seen.append((self.path, body))
        instead = self.server.instead.get(self.path)
        if instead:
            status, text = instead.pop(0)
            if status is None:  # hangs up
                return
        else:
            answer = self.server.answer(self.path, body)
            status, text = 200, "" if answer is None else json.dumps(answer)
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def stand_in():
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server(stand_in, tmp_path):
    return Server(server_settings(stand_in.url + "/"), tmp_path)


def test_each_candidate_is_one_request_with_its_own_seed(stand_in, server):
    keys = row_keys(3, 1, range(len(PROMPTS)), 2)
    rows = server.sample(PROMPTS, SAMPLING, (262, 5), keys)
    bodies = {body["seed"]: body for path, body in stand_in.seen if path == "/v1/completions"}
    assert len(bodies) == 6
    for i, (row, key) in enumerate(zip(rows, keys)):
        seed = int(key) % 2**63
        assert bodies[seed] == {
            "model": "served", "prompt": PROMPTS[i // 2], "return_token_ids": True, "max_tokens": 6, "temperature": 0.7,
            "top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.0, "stop_token_ids": [262, 5],
            "ignore_eos": True, "seed": seed,
        }  # fmt: skip
        assert row.ids == [int(digit) for digit in str(seed)][:6]
        assert row.logprobs is None and row.entropy is None


def test_the_requests_of_a_rollout_are_in_flight_together(stand_in, server):
    stand_in.together = threading.Barrier(6)  # breaks unless all six wait at it
    assert len(server.sample(PROMPTS, SAMPLING, (262,), row_keys(3, 1, range(3), 2))) == 6


def test_new_weights_are_loaded_and_then_the_old_cache_is_dropped(stand_in, server, tmp_path):
    models = [small_model(seed) for seed in (1, 2)]
    for model in models:
        server.update(model, tiny_tokenizer())
    calls = [(path, body) for path, body in stand_in.seen if path != "/v1/models"]
    assert [path for path, _ in calls] == ["/collective_rpc", "/reset_prefix_cache"] * 2
    assert calls[0][1]["method"] == "reload_weights" and set(calls[0][1]["kwargs"]) == {"weights_path"}
    for model, (_, weights) in zip(models, stand_in.weights):
        assert weights.keys() == model.state_dict().keys()
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    one, two = (name for name, _ in stand_in.weights)
    assert one != two  # a file under an old name may come out of a cache
    assert list(tmp_path.iterdir()) == []


def test_a_busy_cache_is_asked_again_and_at_last_given_up(stand_in, server, monkeypatch):
    monkeypatch.setattr("gem.rollout.vllm.time.sleep", lambda _: None)
    stand_in.instead["/reset_prefix_cache"] = [(200, '{"success": false}')] * 2
    server.update(small_model(), tiny_tokenizer())
    assert [path for path, _ in stand_in.seen].count("/reset_prefix_cache") == 3
    stand_in.instead["/reset_prefix_cache"] = [(200, '{"success": false}')] * 100
    with pytest.raises(UserError, match="is busy: no other client may use it during a run"):
        server.update(small_model(), tiny_tokenizer())


def test_a_refused_load_is_one_line_and_leaves_no_file(stand_in, server, tmp_path):
    stand_in.instead["/collective_rpc"] = [(500, '{"error": {"message": "Worker failed:\\n no shard"}}')]
    with pytest.raises(UserError) as error:
        server.update(small_model(), tiny_tokenizer())
    assert str(error.value) == f"the vLLM server refused {stand_in.url}/collective_rpc: 500 Worker failed: no shard"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((400, '{"error": {"message": "max_tokens is too large"}}'), "400 max_tokens is too large"),
        ((500, "<html>"), "500 Internal Server Error"),
        ((500, '{"error": "overloaded"}'), "500 Internal Server Error"),
        ((None, ""), "no answer from the vLLM server at"),
        ((200, "<html>"), "did not answer in JSON"),
        ((200, ""), "answered without choices.0.finish_reason"),
        ((200, '{"choices": []}'), "answered without choices.0.finish_reason"),
        ((200, '{"choices": [{"finish_reason": "length"}]}'), "answered without choices.0.token_ids"),
        ((200, '{"choices": [{"finish_reason": "stop", "token_ids": null}]}'), "gave no token_ids"),
        ((200, '{"choices": [{"finish_reason": "stop", "token_ids": ["a"]}]}'), "gave no token_ids"),
        ((200, '{"choices": [{"finish_reason": "abort", "token_ids": [1]}]}'), "did not finish a completion: abort"),
        (
            (200, '{"choices": [{"finish_reason": "length", "token_ids": [1, 2]}]}'),
            "has room for 2 tokens after a prompt",
        ),
    ],
)
def test_a_bad_answer_to_one_request_is_one_line(stand_in, server, answer, words):
    stand_in.instead["/v1/completions"] = [answer]
    with pytest.raises(UserError) as error:
        server.sample(PROMPTS, SAMPLING, (262,), row_keys(3, 1, range(3), 2))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert f"{stand_in.url}/v1/completions" in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", '{"data": []}', '{"data": [{}]}'])
def test_what_serves_no_model_is_no_vllm_server(stand_in, tmp_path, text):
    stand_in.instead["/v1/models"] = [(200, text)]
    with pytest.raises(UserError, match=r"answered without data\.0\.id; is it one\?"):
        Server(server_settings(stand_in.url), tmp_path)


def test_the_check_needs_a_server_in_development_mode(stand_in):
    source = ModelSource("model", None)
    check_vllm(server_settings(stand_in.url + "/"), source)
    stand_in.instead["/reset_prefix_cache"] = [(404, '{"detail": "Not Found"}')]
    with pytest.raises(UserError, match="404 Not Found; start it with VLLM_SERVER_DEV_MODE=1"):
        check_vllm(server_settings(stand_in.url), source)
    stand_in.instead["/health"] = [(503, "")]
    with pytest.raises(UserError, match=r"vllm_server_url: the vLLM server refused .*/health: 503"):
        check_vllm(server_settings(stand_in.url), source)


def test_a_url_without_scheme_is_an_error():
    with pytest.raises(UserError, match="vllm_server_url: expected http://HOST:PORT"):
        server_settings("localhost")


def test_four_bit_weights_and_gguf_files_are_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: name)
    with pytest.raises(UserError, match="4-bit weights cannot be handed to vLLM"):
        check_vllm(bare_settings(use_vllm=True, load_in_4bit=True, use_peft=True), ModelSource("m", None))
    with pytest.raises(UserError, match="a GGUF file cannot be sampled"):
        check_vllm(bare_settings(use_vllm=True), ModelSource("m", "m.gguf"))


def test_a_run_samples_from_a_server(folder, stand_in):
    run = train(settings(folder, "stand_in", **server_fields(stand_in.url)), Console(file=io.StringIO()))
    requests = [body for path, body in stand_in.seen if path == "/v1/completions"]
    assert len(requests) == 2 * 4 * 2  # steps, prompts, candidates
    assert len({body["seed"] for body in requests}) == 16
    first, second = (weights for _, weights in stand_in.weights)
    start = small_model().state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(first[name], start[name]) and not torch.equal(second[name], first[name])
    assert sorted(path.name for path in run.run_dir.iterdir()) == [
        "completions.jsonl", "config.yaml", "metrics.jsonl", "model", "report.html",
    ]  # fmt: skip


def test_weights_have_the_names_of_a_saved_model(tmp_path):
    torch.manual_seed(0)
    moe = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=3, num_experts_per_tok=2,
        )
    )  # fmt: skip
    tied = tiny_model()
    for model, more in ((tied, {"lm_head.weight"}), (moe, set())):
        model.save_pretrained(tmp_path / model.config.model_type)
        saved = load_file(tmp_path / model.config.model_type / "model.safetensors")
        given = policy_weights(model)
        assert given.keys() == saved.keys() | more
        assert all(torch.equal(given[key], saved[key]) for key in saved)
        assert not any(value.requires_grad for value in given.values())
    assert any("experts.2.down_proj" in key for key in saved)  # one by one; transformers holds them fused
    assert torch.equal(policy_weights(tied)["lm_head.weight"], tied.model.embed_tokens.weight)


def test_an_adapter_is_merged_and_stays_on_the_model():
    adapted = with_adapter(tiny_model())
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    given = policy_weights(adapted)
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    merged = adapted.merge_and_unload().state_dict()
    assert given.keys() == merged.keys()
    for name, value in merged.items():
        torch.testing.assert_close(given[name], value, rtol=1e-6, atol=1e-6)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(merged[name], tiny_model().state_dict()[name])


# From here on vLLM itself.


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
