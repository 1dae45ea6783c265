"""What the paths from hidden states cost on a GPU, counted on meta tensors: products, passes over N x V and V x D,
allocations, waits. `bench/counts.py` says what is counted and how."""

from __future__ import annotations

import pytest
import torch

import gem_kernels
from bench.counts import CASES, META, Counter, Waited, counted, predicted, rows_a_chunk, standing_in
from bench.shapes import Head
from gem_kernels.linear import head, products

B, T, V, D = 16, 64, 5000, 32
N = B * T
CHUNKS = 4
ROWS = N // CHUNKS  # half a group of 8


def tensors(dtype=torch.bfloat16, needs=("hidden", "weight"), words=V):
    hidden = torch.empty(B, T, D, dtype=dtype, device=META, requires_grad="hidden" in needs)
    weight = torch.empty(words, D, dtype=dtype, device=META, requires_grad="weight" in needs)
    return {"hidden": hidden, "weight": weight, "targets": torch.empty(B, T, dtype=torch.int64, device=META)}


MASK = torch.empty(B, T, dtype=torch.bool, device=META)


def spans():
    start = torch.empty(B, dtype=torch.int64, device=META)
    return {"completion_mask": MASK, "answer_start": start, "group_size": 8}


def policy(logprobs, entropy):
    return (logprobs + 0.1 * entropy).sum() / 1000


def stats(**options):
    out = gem_kernels.linear_token_stats(**options)
    return policy(out.logprobs, out.entropy)


def score(**options):
    out = gem_kernels.fused_linear_entropy_score(**spans(), **options)
    return policy(out.logprobs, out.entropy)


def sega(**options):
    return gem_kernels.fused_linear_sega_loss(**spans(), **options).loss


CALLS = {
    "stats": stats,
    "score": score,
    "policy": lambda **o: gem_kernels.fused_linear_policy_loss(token_loss=policy, **o).loss,
    "sega": sega,
    "sega, given": lambda **o: sega(advantages=torch.empty(B, dtype=torch.float32, device=META), **o),
}


def room(rows: int, dtype=torch.bfloat16, words=V) -> int:
    return head.row_stride(words) * rows * dtype.itemsize


def count(call, needs=("hidden", "weight"), chunk: int = ROWS, dtype=torch.bfloat16, words=V, **options) -> Counter:
    given = tensors(dtype, needs, words)
    counter = Counter(N, words, D, strict=True)
    with standing_in(), counter:
        loss = call(**given, workspace_bytes=room(chunk, dtype, words), **options)
        if needs:
            loss.backward()
    for name in needs:
        assert given[name].grad.dtype == dtype and given[name].grad.shape == given[name].shape
    return counter


# ---- products and passes over the logits

NEEDS = {"all": ("hidden", "weight"), "hidden": ("hidden",), "weight": ("weight",), "none": ()}
# Two phase makes a group's last chunk of two once.
EXPECTED = {
    "stats": {"all": (4, 7), "hidden": (3, 6), "weight": (3, 6), "none": (1, 2)},
    "score": {"all": (4, 7), "hidden": (3, 6), "weight": (3, 6), "none": (1, 2)},
    "policy": {"all": (3, 6), "hidden": (2, 5), "weight": (2, 5), "none": (1, 2)},
    "sega": {"all": (3.5, 6.5), "hidden": (2, 5), "weight": (2.5, 5.5), "none": (1, 2)},
    "sega, given": {"all": (3, 6), "hidden": (2, 5), "weight": (2, 5), "none": (1, 2)},
}


@pytest.mark.parametrize("needed", NEEDS)
@pytest.mark.parametrize("call", CALLS)
def test_products_and_passes_over_the_logits(call, needed):
    counter = count(CALLS[call], NEEDS[needed])
    made, passes = EXPECTED[call][needed]
    assert counter.products == pytest.approx(made, rel=0.02)  # a chunk is 25 %
    assert counter.logits_passes() == pytest.approx(passes, rel=0.02)


def test_a_frozen_head_is_two_products_at_any_length():
    """8 candidates x 4,096 tokens, 64 MiB, Llama-3's head: 124 chunks."""
    words, width, length = 128_256, 4096, 4096
    hidden = torch.empty(8, length, width, dtype=torch.bfloat16, device=META, requires_grad=True)
    weight = torch.empty(words, width, dtype=torch.bfloat16, device=META)
    targets = torch.empty(8, length, dtype=torch.int64, device=META)
    span = {
        "completion_mask": torch.ones(8, length, dtype=torch.bool),
        "answer_start": torch.empty(8, dtype=torch.int64, device=META),
        "group_size": 8,
    }
    counter = Counter(8 * length, words, width, strict=True)
    with standing_in(), counter:
        given = {"hidden": hidden, "weight": weight, "targets": targets, "workspace_bytes": 64 << 20}
        out = gem_kernels.fused_linear_sega_loss(**given, **span)
        assert out.path == "one_shot"
        out.loss.backward()
    assert counter.products == pytest.approx(2, rel=1e-3)
    assert counter.logits_passes() == pytest.approx(5, rel=1e-3)
    # dHidden, a float32 copy of it until the weights are known, and the workspace.
    assert counter.peak <= 3 * 2 * 8 * length * width + (72 << 20)


# ---- passes over the weight and its gradient


@pytest.mark.parametrize("call", CALLS)
def test_two_float32_passes_over_dweight_a_chunk(call):
    """The first chunk writes it, each other reads and writes it; at the end it is converted. The upstream scalar of the
    one-shot losses passes over the 16-bit one."""
    one, many = (count(CALLS[call], ("weight",), chunk=chunk) for chunk in (N, N // 8))
    assert one.fp32_weight == 0
    assert many.fp32_weight == (1 + 2 * 7 + 1) * V * D
    made = [(dtype, shape) for dtype, shape in many.made if shape == (V, D)]
    assert sorted(made, key=str) == [(torch.bfloat16, (V, D)), (torch.float32, (V, D))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_one_chunk_writes_dweight_once_in_its_own_dtype(call, dtype):
    counter = count(CALLS[call], chunk=N, dtype=dtype)
    assert [(kind, shape) for kind, shape in counter.made if shape == (V, D)] == [(dtype, (V, D))]
    again = call in ("stats", "score")  # the logits are made twice
    scaled = 0 if again else 2
    assert counter.weight_passes() == 2 + again + 1 + scaled


def test_float16_waits_in_float32_and_pays_for_its_scale():
    """The first chunk is written and multiplied by its power of two; of the others the product is written, and added
    with it. The upstream scalar passes over it, and then it is rounded."""
    counter = count(CALLS["policy"], ("weight",), chunk=N // 8, dtype=torch.float16)
    assert counter.fp32_weight == (3 + 4 * 7 + 2 + 1) * V * D


def test_without_addmm_into_float32_a_slice_at_a_time(monkeypatch):
    monkeypatch.setattr(products, "adds_in_product", lambda: False)
    counter = count(CALLS["policy"], ("weight",), chunk=N // 8)
    assert counter.fp32_weight == (1 + 4 * 7 + 1) * V * D
    assert max(size_of(made) for made in counter.made if made[1] != (V, D)) <= room(N // 8)


def test_one_word_and_one_unit_never_take_addmm():
    """cuBLAS would read a vector as a bias."""
    for words, width in ((1, 8), (8, 1)):
        given = [torch.empty(6, width, dtype=torch.bfloat16, device=META, requires_grad=True)]
        given += [torch.empty(words, width, dtype=torch.bfloat16, device=META, requires_grad=True)]
        counter = Counter(6, words, width)
        with standing_in(), counter:
            targets = torch.empty(6, dtype=torch.int64, device=META)
            loss = gem_kernels.fused_linear_policy_loss(
                *given, targets, policy, workspace_bytes=room(2, words=words)
            ).loss
            loss.backward()
        assert "addmm" not in counter.names


# ---- the workspace


def size_of(made) -> int:
    dtype, shape = made
    return dtype.itemsize * torch.Size(shape).numel()


@pytest.mark.parametrize(
    "words, logits_dtype, rows",
    [
        (128_256, None, 4096),
        (128_256, torch.float32, 1280),
        (151_936, None, 3328),
        (50_257, None, 10_496),
        (10**9, None, 1),
    ],
)
def test_the_default_workspace_of_a_gpu(words, logits_dtype, rows):
    """At most 1 GiB, in multiples of 256 rows."""
    parameters = head.HeadParameters(
        torch.empty(words, 8, dtype=torch.bfloat16, device=META),
        None,
        torch.bfloat16,
        logits_dtype or torch.bfloat16,
        head.WORKSPACE_BYTES,
        tile_rows=head.TILE_ROWS,
    )
    assert head.WORKSPACE_BYTES == 2**30 and parameters.rows_per_chunk == rows


def test_the_default_workspace_is_what_the_call_needs():
    counter, given = Counter(N, V, D), tensors()
    with torch.no_grad(), standing_in(), counter:
        gem_kernels.linear_token_stats(**given)
    workspace = [made for made in counter.made if V in made[1] or head.row_stride(V) in made[1]]
    assert workspace == [(torch.bfloat16, (N, head.row_stride(V)))]


@pytest.mark.parametrize("words", [50_257, 32_001, 5000])
def test_rows_of_the_workspace_begin_at_16_bytes(words):
    counter = count(CALLS["policy"], words=words, chunk=64)
    assert {stride[-2:] for stride in counter.logits_strides} == {(words + -words % 8, 1)}


# ---- rows that the host knows


@pytest.mark.parametrize("call", ["stats", "policy"])
def test_rows_that_the_host_knows_are_the_only_ones_multiplied(call):
    half = count(CALLS[call], rows=torch.arange(0, N, 2))
    assert half.products == pytest.approx(count(CALLS[call]).products / 2, rel=0.02)


@pytest.mark.parametrize("call, made", [("score", 4 * 5 / 8), ("sega", 4 * 5 / 8 - 1 / 2), ("sega, given", 3 * 5 / 8)])
def test_a_mask_on_the_host_leaves_its_padding_out(call, made, monkeypatch):
    mask = torch.arange(T) < torch.tensor([T, T // 4] * (B // 2))[:, None]
    monkeypatch.setitem(globals(), "MASK", mask)
    assert count(CALLS[call]).products == pytest.approx(made, rel=0.02)


def test_offsets_on_the_host_cut_the_groups():
    """Packed rows: where only the device has the offsets, all groups are one run, and one chunk of all is made once."""
    made = {}
    for device in ("cpu", META):
        offsets = (torch.arange(B + 1, dtype=torch.int32) * T).to(device)
        given = tensors()
        given = {"hidden": given["hidden"].view(N, D), "weight": given["weight"], "targets": given["targets"].view(N)}
        counter = Counter(N, V, D, strict=True)
        span = spans() | {"cu_seqlens": offsets}
        del span["completion_mask"]
        with standing_in(), counter:
            gem_kernels.fused_linear_sega_loss(**given, **span, workspace_bytes=room(ROWS)).loss.backward()
        made[str(device)] = counter.products
    assert made["cpu"] == pytest.approx(3.5, rel=0.02) and made["meta"] == pytest.approx(3.75, rel=0.02)


# ---- waits. `count` is strict: each test above would fail where something waits.


WAITING = {
    "item": lambda x: x.sum().item(),
    "a branch": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "a mask as an index": lambda x: x[x > 0],
    "a mask as the index of an assignment": lambda x: x.index_put_((x > 0,), torch.zeros((), device=META)),
    "a list to the device": lambda x: x.new_tensor([1.0, 2.0]),
    "a number to the device": lambda x: torch.as_tensor(2.0, device=META),
    "a tensor to the device": lambda x: torch.ones(3).to(META),
    "a copy": lambda x: x.copy_(torch.ones(3)),
}


@pytest.mark.parametrize("what", WAITING)
def test_what_waits_is_seen(what):
    with pytest.raises(Waited), standing_in(), Counter(N, V, D, strict=True):
        WAITING[what](torch.empty(3, device=META))


def test_pinned_memory_does_not_wait():
    with standing_in(), Counter(N, V, D, strict=True):
        gem_kernels.arguments.to_device(torch.ones(3), META)


OPTIONS = [
    {"temperature": torch.empty(B, 1, device=META)},
    {"temperature": torch.tensor(0.7)},
    {
        "bias": torch.empty(V, dtype=torch.bfloat16, device=META, requires_grad=True),
        "softcap": 30.0,
        "logit_scale": 0.5,
    },
    {"logits_dtype": torch.float32},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o))
@pytest.mark.parametrize("call", CALLS)
def test_no_option_waits(call, options):
    count(CALLS[call], **options)


@pytest.mark.parametrize(
    "denominator", [3.0, torch.tensor(3.0), torch.empty((), device=META)], ids=["number", "host", "device"]
)
@pytest.mark.parametrize("loss_type", ["sum", "mean", "token", "constant"])
def test_no_denominator_waits(loss_type, denominator):
    def call(**o):
        options = {"loss_type": loss_type, "denominator": denominator, "max_completion_length": T}
        return gem_kernels.fused_linear_sega_loss(**spans(), **options, **o).loss

    count(call)


def test_functions_of_logits_do_not_wait():
    """They are operators; what runs under their fake implementations is what is around the kernels."""
    logits = torch.empty(B, T, V, dtype=torch.bfloat16, device=META, requires_grad=True)
    targets = torch.empty(B, T, dtype=torch.int64, device=META)
    with Counter(N, V, D, strict=True):
        stats = gem_kernels.token_stats(logits, targets)
        scores = gem_kernels.entropy_scores(stats.entropy, **{k: v for k, v in spans().items() if k != "group_size"})
        gem_kernels.group_advantages(scores.score, 8, valid=scores.valid)
        gem_kernels.fused_entropy_score(logits, targets, **spans())
        for denominator in (None, 3.0):
            gem_kernels.sega_loss(logits, targets, **spans(), denominator=denominator).loss.backward()


# ---- the table of bench.counts


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_the_table_predicts_is_what_it_counts(case):
    """Six chunks; a group of 8 x 512 tokens is three."""
    shape = Head("wide", 300_000, 16)
    assert rows_a_chunk(shape) == 1536
    found = counted(case, shape)
    made, logits, weight = predicted(case, 1536)
    assert found.products == pytest.approx(made, rel=1e-3) and found.logits_passes() == pytest.approx(logits, rel=1e-3)
    assert found.weight_passes() == pytest.approx(weight, abs=0.2) and found.waits == []
