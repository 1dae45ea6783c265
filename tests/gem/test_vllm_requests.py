"""Sampling with vLLM, against a stand-in of its server: what is asked of it, and what its answers come to."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from gem.config.settings import Sampling
from gem.errors import UserError
from gem.loop import train
from gem.model.source import ModelSource
from gem.rollout.sample import row_keys
from gem.rollout.vllm import Server, check_vllm, policy_weights
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
from tests.helpers import tiny_model, tiny_tokenizer

SAMPLING = Sampling(num_generations=2, max_completion_length=6, temperature=0.7, top_p=0.9, top_k=20, min_p=0.01)


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill_folder(tmp_path_factory.mktemp("gem"))


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
