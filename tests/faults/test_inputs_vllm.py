"""What a vLLM server may answer, and who it is told the key: each mistake is one line without the key in it."""

from __future__ import annotations

import json

import pytest

from gem.config.settings import RolloutSettings
from gem.errors import UserError
from gem.rollout.sample import row_keys
from gem.rollout.vllm import Server, _request
from tests.gem.test_vllm_requests import SAMPLING, StandIn, stand_in  # noqa: F401
from tests.gem.vllm_data import server_settings, small_model
from tests.helpers import tiny_tokenizer

KEY = "sk-very-secret"


def completion(ids, reason="length"):
    return [(200, json.dumps({"choices": [{"finish_reason": reason, "token_ids": ids}]}))]


ANSWERS = {
    "no token": (completion([]), "gave 0 tokens, expected 1 to 6"),
    "no token at a stop": (completion([], "stop"), "gave 0 tokens, expected 1 to 6"),
    "too many": (completion([1] * 7), "gave 7 tokens, expected 1 to 6"),
    "negative": (completion([1, -1, 2, 3, 4, 5]), "gave the token -1, which is none of the 272 of the model"),
    "past the vocabulary": (completion([1, 272, 2, 3, 4, 5]), "gave the token 272, which is none of the 272"),
    "past 64 bits": (completion([10**40] * 6), f"gave the token {'1' + 19 * '0'}, which is none"),
    "a truth value": (completion([True] * 6), "gave no token_ids"),
    "a stop of its own": (completion([1, 7], "stop"), "stopped a completion at the token 7, which is no end token"),
    "5,000 digits": ([(200, '{"choices": [{"token_ids": [' + "1" * 5000 + "]}]}")], "did not answer in JSON"),
    "nested": ([(200, "[" * 100_000)], "did not answer in JSON"),
    "elsewhere": ([(302, "")], "302 Found"),
    "a key is missing": ([(401, '{"error": "Unauthorized"}')], "set VLLM_API_KEY to the key that it was started with"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_what_a_server_must_not_answer(case, stand_in, tmp_path):  # noqa: F811
    answer, words = ANSWERS[case]
    server = Server(server_settings(stand_in.url), tmp_path)
    server.update(small_model(), tiny_tokenizer())
    stand_in.instead["/v1/completions"] = list(answer)
    with pytest.raises(UserError) as error:
        server.sample([[1, 2]], SAMPLING.changed(num_generations=1), (262,), row_keys(3, 1, range(1), 1))
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_the_key_goes_to_the_server_and_nowhere_else(stand_in, monkeypatch):  # noqa: F811
    seen = []
    with StandIn() as other:
        handler = stand_in.RequestHandlerClass

        def reply(self, body):
            seen.append((self.server, self.headers.get("Authorization")))
            self.send_response(302 if self.path == "/moved" else 200)
            self.send_header("Location", f"{other.url}/taken")
            self.send_header("Content-Length", "0")
            self.end_headers()

        monkeypatch.setattr(handler, "reply", reply)
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        _request(f"{stand_in.url}/open")
        monkeypatch.setenv("VLLM_API_KEY", KEY)
        _request(f"{stand_in.url}/open")
        with pytest.raises(UserError, match=r"refused .*/moved: 302") as error:
            _request(f"{stand_in.url}/moved", timeout=5)
        assert seen == [(stand_in, None), (stand_in, f"Bearer {KEY}"), (stand_in, f"Bearer {KEY}")]
        assert KEY not in str(error.value)


@pytest.mark.parametrize("key", [f"{KEY}\n", f"a {KEY}", f"{KEY}é"])
def test_a_key_that_no_header_may_hold(key, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(UserError, match="VLLM_API_KEY: holds") as error:
        _request("http://127.0.0.1:9/health")
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        *("localhost", "ftp://host", "http://", "http://host:99999", "http://host:x", "http://[::1", "http://a b", ""),
        *(f"http://user:{KEY}@host:8000", f"http://{KEY}@host", f"http://host/?key={KEY}", f"http://host\n{KEY}"),
    ],
)
def test_an_address_that_is_none_is_not_repeated(url):
    with pytest.raises(UserError, match="config: vllm_server_url: expected http://HOST:PORT") as error:
        RolloutSettings(vllm_server_url=url)
    assert KEY not in str(error.value) and "\n" not in str(error.value)
    assert RolloutSettings(vllm_server_url="https://[::1]:8000/base").vllm_server_url
