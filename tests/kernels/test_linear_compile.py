"""Functions of hidden states under torch.compile: no graph break, eager numbers, operators that pass opcheck."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import gem_kernels
from gem_kernels import LinearScore
from gem_kernels.linear import operators
from gem_kernels.linear.head import LinearArguments
from tests.kernels.helpers import IGNORE, assert_near

pytestmark = pytest.mark.usefixtures("one_thread")

V, D = 37, 8


def inputs(B=4, T=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=generator, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, requires_grad=True)
    targets = torch.randint(0, V, (B, T), generator=generator)
    targets[0, 1] = IGNORE
    return hidden, weight, targets


def spans(targets):
    B, T = targets.shape
    mask = torch.arange(T) < torch.arange(T - B + 1, T + 1)[:, None]
    return {"completion_mask": mask, "answer_start": torch.full((B,), T - 3), "group_size": 2}


def stats(hidden, weight, targets, temperature=1.0, softcap=9.0):
    out = gem_kernels.linear_token_stats(hidden * 2, weight, targets, temperature=temperature, softcap=softcap)
    return (out.logprobs + 0.1 * out.entropy).sum(), out.entropy


def score(hidden, weight, targets, temperature=1.0, softcap=9.0):
    options = {"temperature": temperature, "softcap": softcap}
    out = gem_kernels.fused_linear_entropy_score(hidden * 2, weight, targets, **spans(targets), **options)
    return (out.advantages[:, None] * out.logprobs).sum(), out.score


def sega(hidden, weight, targets, temperature=1.0, softcap=9.0):
    options = {"temperature": temperature, "softcap": softcap, "denominator": 3.0 * temperature}
    out = gem_kernels.fused_linear_sega_loss(hidden * 2, weight, targets, **spans(targets), **options)
    return out.loss * 3, out.advantages


def policy(hidden, weight, targets, temperature=1.0, softcap=9.0):
    def token_loss(logprobs, entropy, old, counts):
        return -(((logprobs - old).exp().clamp(max=1.2) + 0.1 * entropy) * counts).sum()

    # Compiled, an ignored token is seen with a log-prob of 0, as on a GPU.
    old = {"old": torch.full(targets.shape, -3.0), "counts": (targets != IGNORE).float()}
    out = gem_kernels.fused_linear_policy_loss(
        hidden * 2, weight, targets, token_loss, token_inputs=old, temperature=temperature, softcap=softcap
    )
    return out.loss, out.entropy


def packed(hidden, weight, targets, temperature=1.0, softcap=9.0):
    B, T = targets.shape
    layout = {"cu_seqlens": torch.arange(B + 1, dtype=torch.int32) * T, "answer_start": torch.full((B,), T - 3)}
    out = gem_kernels.fused_linear_entropy_score(
        (hidden * 2).flatten(0, 1), weight, targets.flatten(), **layout, group_size=2, temperature=temperature
    )
    return (out.advantages.repeat_interleave(T) * out.logprobs).sum(), out.score


def mixed(hidden, weight, targets, temperature=1.0, softcap=9.0):
    """A float32 weight and bfloat16 hidden states; then autocast."""
    options = {"temperature": temperature, "softcap": softcap}
    low = (hidden * 2).bfloat16()
    one = gem_kernels.linear_token_stats(low, weight, targets, compute_dtype=torch.bfloat16, **options)
    out = gem_kernels.fused_linear_sega_loss(
        low, weight, targets, **spans(targets), **options, compute_dtype=torch.float32
    )
    with torch.autocast("cpu", torch.bfloat16):
        two = gem_kernels.linear_token_stats(hidden * 2, weight, targets, **options)
        more = gem_kernels.fused_linear_sega_loss(hidden * 2, weight, targets, **spans(targets), **options)
    loss = (one.logprobs + 0.1 * one.entropy + two.logprobs).sum() + out.loss + more.loss
    return loss, torch.stack([one.entropy, two.entropy])


FUNCTIONS = {f.__name__: f for f in (stats, score, packed, sega, policy, mixed)}


def run(function, given, *more):
    leaves = [x.detach().clone().requires_grad_() for x in given[:2]]
    value, other = function(*leaves, given[2], *more)
    value.backward()
    return value.detach(), other.detach(), *(x.grad for x in leaves)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_for_every_size_and_number(name):
    """fullgraph: a break would raise. Sizes, temperature, softcap and denominator change."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend=counter)
    for B, T, temperature, softcap in ((4, 6, 1.0, 9.0), (2, 9, 0.7, 8.0), (6, 11, 1.3, 7.0)):
        given = inputs(B, T, seed=T)
        want, got = (run(f, given, temperature, softcap) for f in (FUNCTIONS[name], compiled))
        for x, y in zip(got, want, strict=True):
            assert_near(x, y)
    assert counter.frame_count <= 3


def test_a_frozen_head_and_a_linear_score():
    torch._dynamo.reset()
    hidden, weight, targets = inputs()
    linear = LinearScore({"mean_logprob": 1.0, "length": -0.1})

    def function(hidden):
        return gem_kernels.fused_linear_sega_loss(hidden, weight.detach(), targets, **spans(targets), score=linear)

    out = torch.compile(function, fullgraph=True, backend="aot_eager")(hidden)
    want = function(hidden)
    assert out.path == "compiled" and want.path == "one_shot"
    assert_near(*(torch.autograd.grad(x.loss, hidden)[0] for x in (out, want)))
    for name in ("score", "advantages", "entropy", "final_entropy"):
        assert_near(getattr(out, name), getattr(want, name))


def test_bad_input_is_the_same_value_error():
    torch._dynamo.reset()
    hidden, weight, targets = inputs()
    compiled = torch.compile(lambda t: gem_kernels.linear_token_stats(hidden, weight, t).entropy, backend="aot_eager")
    with pytest.raises(ValueError, match=r"^`targets` must be in \[0, 37\)"):
        compiled(targets + V)


def flat(dtype=torch.float32, head=None, **options):
    hidden, weight, targets = inputs()
    bias = torch.zeros(V, dtype=head or dtype, requires_grad=True)
    hidden, weight = (x.detach().to(d).requires_grad_() for x, d in ((hidden, dtype), (weight, head or dtype)))
    given = LinearArguments(
        hidden, weight, targets, bias, 0.7, None, 1.0, IGNORE, None, None, None, "auto",
        compute_dtype=None if head is None else torch.bfloat16,
    )  # fmt: skip
    return operators._flat(given, *options.get("more", ()))


HEADS = [(torch.float32, None), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize(("dtype", "head"), HEADS, ids=str)
def test_opcheck_of_the_statistics(dtype, head):
    arguments = flat(dtype, head)
    rows = torch.arange(0, 24, 2)
    results = torch.library.opcheck(torch.ops.gem_kernels.linear_stats.default, (*arguments, rows))
    assert set(results.values()) == {"SUCCESS"}
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    vectors = [x.detach() for x in torch.ops.gem_kernels.linear_stats(*plain, rows)[1:]]
    a, b = torch.randn(2, *vectors[0].shape).unbind()
    backward = (*plain, rows, *vectors, a.clone(), b.clone(), [True, False, True])
    results = torch.library.opcheck(torch.ops.gem_kernels.linear_stats_backward.default, backward)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("dtype", "head"), [(torch.float16, None), *HEADS], ids=str)
def test_opcheck_of_sega(dtype, head):
    arguments = flat(dtype, head, more=(1.0, 1e-4, 0.1, 2.0))
    layout = spans(arguments[2])
    more = (
        layout["completion_mask"], None, layout["answer_start"], 2, None, 0, "tail", None, "identity", "none", None,
        "sum", None, None, True, None, [True, True, True],
    )  # fmt: skip
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    results = torch.library.opcheck(torch.ops.gem_kernels.linear_sega.default, (*arguments, *more), test_utils=tests)
    assert set(results.values()) == {"SUCCESS"}
