"""torch.set_default_dtype and torch.device contexts of the caller change no number of any public function."""

from __future__ import annotations

import contextlib

import pytest
import torch

import gem_kernels as gk
from tests.import_rules import files, vague_allocations
from tests.kernels.helpers import policy

pytestmark = pytest.mark.usefixtures("one_thread")
B, T, V, D = 4, 6, 41, 12
ROWS = 7  # a chunk


def inputs(dtype: torch.dtype, device: torch.device) -> dict:
    """Every number of the calls, made under torch's own defaults."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(B, T, V, generator=generator)
    hidden, weight = torch.randn(B, T, D, generator=generator), torch.randn(V, D, generator=generator)
    mask = torch.rand(B, T, generator=generator) > 0.2
    offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    given = {
        "logits": logits.to(dtype),
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "bias": torch.randn(V, generator=generator).to(dtype),
        "targets": torch.randint(0, V, (B, T), generator=generator),
        "mask": mask,
        "cu_seqlens": offsets,
        "answer_start": torch.tensor([2, 1, 9, 0]),
        "tau": 0.5 + torch.rand(B, T, generator=generator),
        "a": torch.randn(B, T, generator=generator),
        "advantages": torch.randn(B, generator=generator),
    }
    return {name: value.to(device) for name, value in given.items()}


def spans(x: dict) -> dict:
    return {"completion_mask": x["mask"], "answer_start": x["answer_start"], "group_size": 2}


def linear(x: dict, function, **options):
    leaves = [x[name].detach().clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    size = ROWS * V * x["hidden"].element_size()
    out = function(leaves[0], leaves[1], x["targets"], bias=leaves[2], **{"workspace_bytes": size, **options})
    return out, leaves


def with_gradient(out, leaves, x: dict) -> list:
    if hasattr(out, "loss"):
        out.loss.backward()
    else:
        torch.autograd.backward([out.logprobs, out.entropy], [x["a"], 2 * x["a"]])
    values = [v.detach() for v in vars(out).values() if isinstance(v, torch.Tensor)]
    return values + [leaf.grad for leaf in leaves]


def of_logits(function, inplace: bool = False, **more):
    def call(x: dict, backend: str) -> list:
        leaf = x["logits"].detach().clone().requires_grad_()
        logits = leaf * 1.0 if inplace else leaf
        options = {k: v(x) if callable(v) else v for k, v in more.items()}
        if function is not gk.token_stats:
            options |= spans(x)
        return with_gradient(
            function(logits, x["targets"], inplace_backward=inplace, backend=backend, **options), [leaf], x
        )

    return call


def of_hidden(function, **more):
    def call(x: dict, backend: str) -> list:
        options = {k: v(x) if callable(v) and k != "token_loss" else v for k, v in more.items()}
        if "score" in function.__name__ or "sega" in function.__name__:
            options |= spans(x)
        return with_gradient(*linear(x, function, backend=backend, **options), x)

    return call


def packed(x: dict, backend: str) -> list:
    x = {**x, **{name: x[name][x["mask"]] for name in ("hidden", "targets")}}
    span = {"cu_seqlens": x["cu_seqlens"], "answer_start": x["answer_start"], "group_size": 2}
    out, leaves = linear(x, gk.fused_linear_sega_loss, backend=backend, **span)
    return with_gradient(out, leaves, x)


def scores_and_advantages(x: dict, backend: str) -> list:
    span = spans(x)
    size = span.pop("group_size")
    scores = gk.entropy_scores(x["a"].abs(), **span, backend=backend)
    return [*vars(scores).values()] + [
        gk.group_advantages(scores.score, size, valid=scores.valid, mapping=mapping, scale=scale, backend=backend)
        for mapping in ("identity", "softmax", "rank")
        for scale in ("none", "group")
    ]


def features(x: dict, backend: str) -> list:
    span = spans(x)
    del span["group_size"]
    found = gk.completion_features(x["a"].abs(), -x["a"].abs(), **span, backend=backend)
    return [*vars(found).values(), found.score(gk.LinearScore({"mean_logprob": 2.0, "length": -0.1}))]


def answers(x: dict, backend: str) -> list:
    """Of token ids, and of offsets of one character a token; no backend is chosen."""
    tokens, mask = x["targets"], x["mask"]
    marker = [int(tokens[0, 1])]
    ends = torch.arange(1, tokens.shape[1] + 1, dtype=torch.int64, device=tokens.device)
    offsets = torch.stack([ends - 1, ends], -1).expand(*tokens.shape, 2).contiguous()
    reached = torch.full_like(tokens[:, 0], 2)
    return [
        gk.answer_start(tokens, marker, completion_mask=mask),
        gk.answer_start_from_offsets(offsets, reached, completion_mask=mask),
    ]


def by_id(x: dict, backend: str) -> list:
    ids = x["targets"][:, 0] % 2
    return [
        gk.group_advantages(x["advantages"], group_ids=ids, mapping=mapping, scale=scale, backend=backend)
        for mapping in ("identity", "softmax", "rank")
        for scale in ("none", "group")
    ]


CALLS = {
    "answer_start, answer_start_from_offsets": answers,
    "num_fork_tokens": lambda x, backend: [gk.num_fork_tokens(x["answer_start"], top_m) for top_m in (0.1, 2)],
    "completion_features": features,
    "token_stats": of_logits(gk.token_stats, temperature=lambda x: x["tau"], softcap=9.0),
    "token_stats in place": of_logits(gk.token_stats, inplace=True),
    "fused_entropy_score": of_logits(gk.fused_entropy_score),
    "sega_loss": of_logits(gk.sega_loss, loss_type="token"),
    "sega_loss, denominator": of_logits(gk.sega_loss, denominator=3.0, advantages=lambda x: x["advantages"]),
    "entropy_scores, group_advantages": scores_and_advantages,
    "linear_token_stats": of_hidden(gk.linear_token_stats, temperature=lambda x: x["tau"], softcap=9.0),
    "linear_token_stats, one row a chunk": of_hidden(gk.linear_token_stats, workspace_bytes=1),
    "linear_token_stats, float32 logits": of_hidden(gk.linear_token_stats, logits_dtype=torch.float32),
    "linear_token_stats, active": of_hidden(gk.linear_token_stats, active_vocab=2.0**-6),
    "fused_linear_entropy_score": of_hidden(gk.fused_linear_entropy_score),
    "fused_linear_policy_loss": of_hidden(gk.fused_linear_policy_loss, token_loss=policy),
    "fused_linear_policy_loss, active": of_hidden(gk.fused_linear_policy_loss, token_loss=policy, active_vocab=0.05),
    "fused_linear_sega_loss": of_hidden(gk.fused_linear_sega_loss),
    "fused_linear_sega_loss, advantages": of_hidden(gk.fused_linear_sega_loss, advantages=lambda x: x["advantages"]),
    "fused_linear_sega_loss, packed": packed,
    "group_advantages by group_ids": by_id,
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", CALLS)
def test_the_caller_s_defaults_change_nothing(name, backend, dtype, device):
    x = inputs(dtype, device)
    want = CALLS[name](x, backend)
    for which, context in DEFAULTS.items():
        with context():
            got = CALLS[name](x, backend)
        assert len(got) == len(want)
        for i, (one, other) in enumerate(zip(got, want)):
            assert (one.dtype, one.device) == (other.dtype, other.device), (which, i)
            assert torch.equal(one, other), f"default {which}: result {i}"


def test_every_public_function_is_called():
    functions = {name for name in gk.__all__ if name[0].islower()} - {"read_score_file"}  # it makes no tensor
    assert all(any(function in call for call in CALLS) for function in functions)


def test_every_allocation_names_dtype_and_device():
    found = {name: vague_allocations(path.read_text()) for name, path in files("gem_kernels").items()}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_the_rule_sees_an_allocation():
    assert vague_allocations("x = torch.zeros(3, device=d)") == ["1: torch.zeros(3, device=d)"]
    assert vague_allocations("torch.zeros(3, dtype=t, device=d); torch.zeros_like(x); x.new_zeros(3)") == []
