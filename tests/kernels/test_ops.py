"""The custom operators under opcheck and torch.compile, and every bad argument's one ValueError."""

from __future__ import annotations

import inspect
import os
import re

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
import torch._inductor.cpu_vec_isa
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

import gem_kernels
from gem_kernels import (
    answer_start,
    answer_start_from_offsets,
    arguments,
    completion_features,
    entropy_scores,
    fused_entropy_score,
    group_advantages,
    num_fork_tokens,
    sega_loss,
    token_stats,
)
from gem_kernels.types import EXTRA_STATS
from tests.kernels.helpers import BACKENDS, assert_near, make

INNER = {"triton": "triton", "torch": "torch", "auto": "cpu"}  # as the operators are told
each_backend = pytest.mark.parametrize("backend", [INNER[b] for b in BACKENDS])
ops = torch.ops.gem_kernels


def opcheck(op, args, **options) -> None:
    results = torch.library.opcheck(op, args, **options)
    assert set(results.values()) == {"SUCCESS"}


@each_backend
@pytest.mark.parametrize("case", ["fp32 padded", "bf16 packed", "strided"])
def test_opcheck_row_stats(case, backend, device):
    shape = (2, 3, 40) if case == "fp32 padded" else (6, 40)
    logits, targets = make(*shape, dtype=torch.bfloat16 if "bf16" in case else torch.float32, device=device)
    tau = None if case == "bf16 packed" else torch.rand(6, device=device) + 0.5
    if case == "strided":
        logits, targets = make(2, 4, 41, device=device)[0][:, 1:].detach(), targets.view(2, 3)
        targets[0, 1] = -100
    extra = EXTRA_STATS if case == "strided" else ()
    args = (logits.requires_grad_(), targets % 40, 1.0, tau, 30.0 if tau is None else None, -100, backend, extra)
    opcheck(ops.row_stats.default, args)
    logits = logits.detach()
    _logprobs, entropy, row_max, log_sum, more = ops.row_stats(logits, *args[1:])
    assert more.shape == (len(extra), *entropy.shape)
    a, b = torch.randn(2, *entropy.shape, device=device).unbind()
    after = (*args[1:6], row_max, log_sum, entropy, a.clone(), b.clone(), backend)
    opcheck(ops.row_stats_backward.default, (logits, *after))
    opcheck(ops.row_stats_backward_.default, (logits.clone(), *after))


@each_backend
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_opcheck_span_scores(layout, backend, device):
    start, valid = torch.tensor([2, 9], device=device), torch.tensor([True, False], device=device)
    weights = [-1.0, 1.0, *[0.0] * 6, 0.5]
    if layout == "padded":
        entropy, mask = torch.rand(2, 7, device=device), torch.ones(2, 7, dtype=torch.bool, device=device)
        args = (entropy, None, mask, None, start, valid, weights, 0.1, 0, False, backend)
    else:
        offsets = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
        entropy, logprobs = torch.rand(2, 9, device=device).unbind()
        args = (entropy, logprobs, None, offsets, start, None, weights, 1.0, 3, True, backend)
    opcheck(ops.span_scores.default, args)


@each_backend
@pytest.mark.parametrize("mapping", ["identity", "softmax", "rank"])
def test_opcheck_group_advantages(mapping, backend, device):
    valid = torch.tensor([True] * 5 + [False], device=device)
    opcheck(ops.group_advantages.default, (torch.rand(6, device=device), 3, valid, mapping, "group", 1e-4, backend))


# torch.compile.


def batch(B=2, T=6, V=40, device="cpu"):
    logits, targets = make(B, T, V, device=device)
    mask = torch.ones(B, T, dtype=torch.bool, device=device)
    mask[0, -1] = False
    return logits, targets, mask, torch.full((B,), T - 2, device=device)


def scores_and_loss(logits, targets, mask, start, temperature=1.0):
    out = fused_entropy_score(
        logits * 2.0, targets, completion_mask=mask, answer_start=start, group_size=2, temperature=temperature
    )
    return (out.advantages[:, None] * out.logprobs + out.entropy).sum(), out.score


def loss(logits, targets, mask, start, temperature=1.0):
    out = sega_loss(
        logits * 2.0,
        targets,
        completion_mask=mask,
        answer_start=start,
        group_size=2,
        temperature=temperature,
        inplace_backward=True,
    )
    return out.loss, out.score


def run(function, logits, *rest):
    z = logits.clone().requires_grad_()
    value, score = function(z, *rest)
    value.backward()
    return value.detach(), score, z.grad


# What inductor writes for a CPU without vector instructions does not compile (torch 2.13: at::vec is not declared).
INDUCTOR = pytest.param(
    loss, "inductor", marks=pytest.mark.skipif(os.environ.get("ATEN_CPU_CAPABILITY") == "default", reason="inductor")
)
# Neither processes to compile in, which cost more than they save here, nor a trial of the processor's vector
# instructions, each kind of which imports torch in a process.
AT_ONCE = {"compile_threads": 1, "cpp.vec_isa_ok": True}


@pytest.fixture
def untried(monkeypatch):
    monkeypatch.setattr(torch._inductor.cpu_vec_isa.VecISA, "_probe_load", lambda *_: True, raising=False)
    # Inductor (torch 2.13) keeps code that it wrote for one vector length, and compiles it for another: wrong numbers.
    kept = f"{default_cache_dir()}-{torch.backends.cpu.get_cpu_capability()}"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", kept)


@pytest.mark.parametrize("function,backend", [(scores_and_loss, "aot_eager"), (loss, "aot_eager"), INDUCTOR])
def test_compiled_gives_the_same_numbers_without_a_graph_break(function, backend, device, untried):
    torch._dynamo.reset()
    problem = batch(device=device)
    want = run(function, *problem)
    with torch._inductor.config.patch(AT_ONCE):
        got = run(torch.compile(function, fullgraph=True, backend=backend), *problem)
    for x, y in zip(got, want, strict=True):
        assert_near(x, y)


@pytest.mark.parametrize("function", [scores_and_loss, loss])
def test_compiled_for_other_sizes(function, device):
    """B, T, N and the temperature change: one more compilation (with symbols), then none."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for B, T in ((2, 6), (4, 9), (6, 11), (8, 5)):
        problem = batch(B, T, device=device)
        for x, y in zip(run(compiled, *problem), run(function, *problem), strict=True):
            assert_near(x, y)
    assert counter.frame_count <= 3


NUMBERS = [(0.7, 0.5, 1e-3, 3.0), (0.8, 0.25, 0.1, 7.0), (1.3, -1.5, 2.0, 0.5), (2.0, 0.0, 0.3, 1.0)]


def test_compiled_for_other_numbers(device):
    """Temperature, fork_weight, eps and denominator change: one more compilation, then none, and no graph break."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(logits, targets, mask, start, temperature, fork_weight, eps, denominator):
        out = sega_loss(
            logits * 2.0, targets, completion_mask=mask, answer_start=start, group_size=2, scale="group",
            temperature=temperature, fork_weight=fork_weight, eps=eps, denominator=denominator,
        )  # fmt: skip
        return out.loss, out.score

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for numbers in NUMBERS:
        problem = (*batch(4, 6, device=device), *numbers)
        for x, y in zip(run(compiled, *problem), run(function, *problem), strict=True):
            assert_near(x, y)
    assert counter.frame_count <= 2


def test_compiled_for_another_softcap_and_top_m(device):
    """Compiled once a value, but never broken: the graph alone is looked at."""
    torch._dynamo.reset()

    def function(logits, targets, mask, start, softcap, top_m):
        out = fused_entropy_score(
            logits, targets, completion_mask=mask, answer_start=start, group_size=2, softcap=softcap, top_m=top_m
        )
        return out.logprobs.sum(), out.score

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for softcap, top_m in ((3.0, 0.1), (4.0, 1 / 3), (4.0, 2)):
        problem = (*batch(device=device), softcap, top_m)
        for x, y in zip(run(compiled, *problem), run(function, *problem), strict=True):
            assert_near(x, y)


def test_what_is_not_compiled_is_not_compiled_inside_a_caller(device):
    """Of functions of hidden states: their own frames stay out, at every length."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    weight = torch.randn(40, 8, device=device)

    @arguments.not_compiled
    def of_hidden(hidden, targets):
        return inner(hidden, targets) + 1.0

    def inner(hidden, targets):
        return gem_kernels.linear_token_stats(hidden, weight, targets).entropy * 2.0

    def caller(hidden, targets):
        return (of_hidden(hidden * 1.0, targets)).sum()

    compiled = torch.compile(caller, backend=counter)
    for T in (4, 5, 6):
        hidden, targets = torch.ones(T, 8, device=device), torch.zeros(T, dtype=torch.int64, device=device)
        assert_near(compiled(hidden, targets), caller(hidden, targets))
    assert counter.frame_count <= 4, "two graphs of the caller, each compiled a second time for any length"


def test_results_are_pytrees():
    logits, targets, mask, start = batch()
    out = fused_entropy_score(logits, targets, completion_mask=mask, answer_start=start, group_size=2)
    leaves, spec = torch.utils._pytree.tree_flatten(out)
    assert len(leaves) == 7
    again = torch.utils._pytree.tree_unflatten([x * 1 for x in leaves], spec)
    assert type(again) is type(out) and torch.equal(again.score, out.score)
    with pytest.raises(AttributeError):
        out.score = None


# Bad arguments. One good call of each function, and what it must say when one argument is replaced.

LOGITS, TARGETS, MASK, START = batch()
ENTROPY = torch.rand(2, 6)
VALID = torch.ones(2, dtype=torch.bool)
OFFSETS = torch.arange(12).view(6, 2).repeat(2, 1, 1)
GOOD = {
    token_stats: {"logits": LOGITS, "targets": TARGETS},
    entropy_scores: {"entropy": ENTROPY, "completion_mask": MASK, "answer_start": START},
    completion_features: {
        "entropy": ENTROPY, "logprobs": -ENTROPY, "completion_mask": MASK, "answer_start": START,
    },
    group_advantages: {"scores": torch.rand(2), "group_size": 2},
    num_fork_tokens: {"num_reasoning": torch.tensor([3, 4])},
    fused_entropy_score: {
        "logits": LOGITS, "targets": TARGETS, "completion_mask": MASK, "answer_start": START, "group_size": 2,
    },
    sega_loss: {
        "logits": LOGITS, "targets": TARGETS, "completion_mask": MASK, "answer_start": START, "group_size": 2,
    },
    answer_start: {"token_ids": TARGETS, "marker": [1, 2], "completion_mask": MASK},
    answer_start_from_offsets: {"offsets": OFFSETS, "answer_offset": START, "completion_mask": MASK},
}  # fmt: skip
PACKED = {
    "completion_mask": None,
    "logits": LOGITS[0],
    "targets": TARGETS[0],
    "entropy": ENTROPY[0],
    "logprobs": -ENTROPY[0],
    "token_ids": TARGETS[0],
    "offsets": OFFSETS[0],
}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


# argument -> bad values, each with what the message says was got
BAD = {
    "logits": [
        ([1.0], "list"),
        (LOGITS.long(), "int64"),
        (LOGITS.double(), "float64"),
        (torch.tensor(1.0), r"\(\)"),
        (torch.zeros(2, 6, 0), r"\(2, 6, 0\)"),
    ],
    "targets": [
        (None, "NoneType"),
        (TARGETS.float(), "float32"),
        (TARGETS.to(torch.int16), "int16"),
        (TARGETS[:, :3], r"\(2, 3\)"),
        (TARGETS + 40, r"4\d|[5-7]\d"),
        (TARGETS - 39, "-"),
        (TARGETS.to("meta"), "meta"),
    ],
    "temperature": [
        (10**400, "integer of 1329 bits"), (1e39, r"1e\+39"), (1e-39, "1e-39"),
        (0.0, "0.0"),
        (-1, "-1"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (True, "True"),
        ("1", "'1'"),
        (None, "None"),
        (torch.ones(3), r"\(3,\)"),
        (torch.ones(2, 6, 1), r"\(2, 6, 1\)"),
        (torch.ones(2, 6, dtype=torch.int64), "int64"),
        (torch.zeros(2, 6), "0.0"),
        (torch.ones(2, 6).requires_grad_(), "requires_grad"),
        (torch.ones(2, 6, device="meta"), "meta"),
    ],
    "softcap": [
        (10**400, "integer of 1329 bits"), (2**130, "1361129467683753853853498429727072845824"),
        (0.0, "0.0"),
        (-5.0, "-5.0"),
        ("5", "'5'"),
        (float("nan"), "nan"),
        (torch.tensor(5.0), "tensor"),
    ],
    "ignore_index": [
        (2**63, "9223372036854775808"),
        (-(2**63) - 1, "-9223372036854775809"),
        (None, "None"),
        (-100.0, "-100.0"),
        (True, "True"),
        (torch.tensor(1), "tensor"),
    ],
    "inplace_backward": [(1, "1"), ("yes", "'yes'"), (None, "None")],
    "backend": [("cuda", "'cuda'"), (None, "None"), ("Triton", "'Triton'")],
    "entropy": [
        ([1.0], "list"),
        (ENTROPY.long(), "int64"),
        (ENTROPY[0], r"\(6,\)"),
        (torch.tensor(1.0), r"\(\)"),
        (torch.rand(2, 6, 1), r"\(2, 6, 1\)"),
    ],
    "logprobs": [
        ([1.0], "list"), (ENTROPY.long(), "int64"), (ENTROPY[0], r"\(6,\)"), (ENTROPY.to("meta"), "meta"),
    ],
    "completion_mask": [
        (None, "neither"),
        (MASK.int() * 2, "2"), (MASK.float(), "float32"),
        (MASK[:, :5], r"\(2, 5\)"),
        ([True], "list"),
        (MASK.to("meta"), "meta"),
    ],
    "answer_start": [
        (START.float(), "float32"),
        (START[:1], r"\(1,\)"),
        ([1, 2], "list"),
        (START[:, None], r"\(2, 1\)"),
        (START.to("meta"), "meta"),
    ],
    "group_size": [
        (2**63, "9223372036854775808"),
        (0, "0"),
        (-2, "-2"),
        (3, "3"),
        (2.0, "2.0"),
        (True, "True"),
        (None, "None"),
    ],
    "group_ids": [
        ([0, 0], "list"),
        (torch.zeros(2), "float32"),
        (torch.zeros(3, dtype=torch.int64), r"\(3,\)"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "meta"),
    ],
    "marker": [
        ([], r"\[\]"), ([[]], r"\[\[\]\]"), ("####", "####"), ([1.0], "1.0"), ([[1], 2], "2"), ([True], "True"),
    ],
    "token_ids": [(None, "NoneType"), (TARGETS.float(), "float32"), (TARGETS[0], r"\(6,\)")],
    "offsets": [
        (None, "NoneType"), (OFFSETS.float(), "float32"), (OFFSETS[..., :1], r"\(2, 6, 1\)"), (OFFSETS[0], r"\(6,\)"),
    ],
    "answer_offset": [
        ([1, 2], "list"), (START.float(), "float32"), (START[:1], r"\(1,\)"), (START.to("meta"), "meta"),
    ],
    "fork_weight": [
        (10**400, "integer of 1329 bits"), (-1e39, r"-1e\+39"),
        ("1", "'1'"),
        (float("nan"), "nan"),
        (None, "None"),
        (float("inf"), "inf"),
    ],
    "top_m": [(2**63, "9223372036854775808"),
        (0, "0"), (-1, "-1"), (0.0, "0.0"), (1.5, "1.5"), (True, "True"), ("0.1", "'0.1'"), (float("nan"), "nan"),
    ],
    "num_reasoning": [(3, "int"), (torch.tensor([3.0]), "float32"), (torch.tensor([True]), "bool")],
    "no_answer": [("last", "'last'"), (None, "None")],
    "valid": [(VALID.int() * 2, "2"), (VALID.float(), "float32"),
        (VALID[:1], r"\(1,\)"), ([True, True], "list"), (VALID.to("meta"), "meta")],
    "mapping": [("linear", "'linear'"), (None, "None")],
    "scale": [("batch", "'batch'"), (True, "True")],
    "score": [("paper", "str"), ({"length": 1.0}, "dict"), (1.0, "float")],
    "eps": [(10**400, "integer of 1329 bits"), ("0", "'0'"), (float("nan"), "nan"), (None, "None")],
    "scores": [([1.0], "list"), (torch.ones(2, dtype=torch.int64), "int64"), (torch.ones(2, 2), r"2, 2")],
    "advantages": [
        ([1.0, 2.0], "list"),
        (torch.ones(3), r"\(3,\)"),
        (torch.ones(2, dtype=torch.int64), "int64"),
        (torch.ones(2).requires_grad_(), "requires_grad|True"),
        (torch.ones(2, device="meta"), "meta"),
    ],
    "loss_type": [("grpo", "'grpo'"), (None, "None")],
    "max_completion_length": [(2**63, "9223372036854775808"), (0, "0"), (8.0, "8.0"), (True, "True")],
    "denominator": [(10**400, "integer of 1329 bits"), (1e39, r"1e\+39"),
        (-1.0, "-1.0"),
        (float("nan"), "nan"),
        ("3", "'3'"),
        (torch.ones(2), r"\(2,\)"),
        (torch.tensor(1.0).requires_grad_(), "requires_grad"),
    ],
    "extra": [("margin", "'margin'"), (None, "None"), ([0], r"\[0\]"), (["margins"], "'margin'"), (("no",), "'no'")],
    "vocab_parallel": [((0, 7), r"\(0, 7\)"), ("world", "'world'")],
    "cu_seqlens": [
        (int32(0, 6).float(), "float32"),
        ([0, 6], "list"),
        (int32(0, 3, 6)[None], r"\(1, 3\)"),
        (int32(), r"\(0,\)"),
        (int32(1, 3, 6), r"1, 3, 6"),
        (int32(0, 3, 5), r"0, 3, 5"),
        (int32(0, 7, 6), r"0, 7, 6"),
    ],
}  # fmt: skip


def bad_calls():
    for function, good in GOOD.items():
        for argument in inspect.signature(function).parameters:
            for i, (value, got) in enumerate(BAD[argument]):
                arguments = {**good, argument: value}
                if argument == "cu_seqlens":
                    arguments |= {k: v for k, v in PACKED.items() if k in good}
                yield pytest.param(function, argument, arguments, got, id=f"{function.__name__}-{argument}-{i}")


@pytest.mark.parametrize("function,argument,arguments,got", bad_calls())
def test_one_value_error_names_the_argument(function, argument, arguments, got):
    with pytest.raises(ValueError) as error:
        function(**arguments)
    message = str(error.value)
    assert re.match(rf"`{argument}` must be ", message), message
    assert re.search(rf", got .*({got})", message), message


def test_every_public_argument_has_bad_values():
    for function in GOOD:
        assert set(inspect.signature(function).parameters) <= set(BAD)
        function(**GOOD[function])  # and the good call is good


@pytest.mark.parametrize("function", [entropy_scores, fused_entropy_score, sega_loss])
def test_one_layout_not_both(function):
    with pytest.raises(ValueError, match=r"`completion_mask` must be .*`cu_seqlens`.*, got both"):
        function(**GOOD[function], cu_seqlens=int32(0, 6, 12))


def test_what_one_argument_asks_of_another():
    good = {k: v for k, v in GOOD[sega_loss].items() if k not in ("answer_start", "group_size")}
    for more, argument in (
        ({"answer_start": START}, "group_size"),
        ({"group_size": 2}, "answer_start"),
        ({"advantages": torch.ones(2), "no_answer": "exclude"}, "answer_start"),
        ({"advantages": torch.ones(2), "loss_type": "constant"}, "max_completion_length"),
    ):
        with pytest.raises(ValueError, match=f"`{argument}` must be .*, got None"):
            sega_loss(**good, **more)
    for logits in (LOGITS[:, :, ::2], LOGITS[:1].expand(2, 6, 40)):
        with pytest.raises(ValueError, match=r"`inplace_backward` must be False .*, got True"):
            token_stats(logits, TARGETS % 20, inplace_backward=True)


def test_groups_are_named_in_one_way():
    one = {k: v for k, v in GOOD[fused_entropy_score].items() if k != "group_size"}
    with pytest.raises(ValueError, match=r"`group_size` must be an integer .*, got None"):
        fused_entropy_score(**one)
    with pytest.raises(ValueError, match=r"`group_size` must be left out where `group_ids` is given, got 2"):
        fused_entropy_score(**one, group_size=2, group_ids=torch.zeros(2, dtype=torch.int64))


def test_public_functions_are_all_here():
    linear = {name for name in gem_kernels.__all__ if "linear" in name}  # theirs: test_linear_head.py
    functions = {name for name in gem_kernels.__all__ if name[0].islower()} - linear - {"read_score_file"}  # a file
    assert functions == {function.__name__ for function in GOOD}


@pytest.mark.parametrize("function", [token_stats, fused_entropy_score, sega_loss])
def test_an_ignore_index_that_the_targets_cannot_hold(function):
    with pytest.raises(ValueError, match=r"`ignore_index` must be .* int32 .*, got 2147483648"):
        function(**GOOD[function] | {"targets": TARGETS.int(), "ignore_index": 2**31})
    function(**GOOD[function] | {"targets": TARGETS.int(), "ignore_index": 2**31 - 1})


@each_backend
@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (0,), (2, 3, 0), (0, 0, 0, 2)], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_no_rows_of_any_shape(shape, strided, backend, device):
    logits = torch.zeros(*shape, 14 if strided else 7, device=device)
    logits = (logits[..., ::2] if strided else logits).requires_grad_()
    backend = "auto" if backend == "cpu" else backend
    stats = token_stats(logits, torch.zeros(shape, dtype=torch.int64, device=device), backend=backend)
    assert stats.logprobs.shape == stats.entropy.shape == shape
    (grad,) = torch.autograd.grad((stats.logprobs + stats.entropy).sum(), logits)
    assert grad.shape == logits.shape
