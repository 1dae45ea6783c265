"""Logits whose vocabulary is cut among three gloo processes give the numbers of the whole rows in one process.

The processes run every case and leave the results in files; the tests read them. All numbers are compared with float64:
they may err twice what the whole rows err, plus rounding.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

import gem_kernels as gk
from gem_kernels import reference
from gem_kernels.backends.cpu import build
from gem_kernels.types import EXTRA_STATS
from tests.kernels.helpers import DTYPES
from tests.kernels.test_vocab_parallel import EPS, B, Count, T, V, assert_as_good, error_of, problem
from tests.processes import run_ranks

WORLD = 3
SIZES = [20, 1, 46]
MASKED = [20, 20, 27]  # words 20..39 have no probability: one rank has nothing else
ADVANTAGES = torch.tensor([1.0, -2.0, 0.5, 0.0])
KINDS = ("stats", "score", "sega", "sega, given")
CASES = [("uneven", kind, "float32") for kind in KINDS] + [("uneven", kind, "bfloat16") for kind in KINDS]
CASES += [
    (name, "stats", "float32") for name in ("ignore", "masked", "special", "confident", "plain", "strided", "extra")
]
CASES += [(name, "stats", dtype) for name in ("in place", "in place of a slice") for dtype in EPS]
CASES += [("in place", "sega", "float32"), ("ignore", "sega", "float32"), ("torch", "stats", "float32")]


def sizes_of(name: str) -> list[int]:
    return MASKED if name == "masked" else SIZES


def given(name: str, dtype: str) -> dict:
    """The whole logits, with the options of the functions of logits."""
    p = problem(name if name in ("ignore", "masked", "special", "confident", "plain") else "uneven")
    logits = p["hidden"] @ p["weight"].t()
    logits = (logits if p["bias"] is None else logits + p["bias"]).to(getattr(torch, dtype))
    options = {k: v for k, v in p["options"].items() if k not in ("logit_scale", "workspace_bytes")}
    if name.startswith("in place"):
        options["inplace_backward"] = True
    if name == "torch":
        options["backend"] = "torch"
    if name == "extra":
        options["extra"] = EXTRA_STATS
    return {**p, "logits": logits, "options": options, "name": name}


def shard(p: dict, rank: int) -> dict:
    starts = [0, *itertools.accumulate(sizes_of(p["name"]))]
    return {**p, "logits": p["logits"][..., starts[rank] : starts[rank + 1]].contiguous()}


def spans(p: dict) -> dict:
    return {"completion_mask": p["mask"], "answer_start": torch.tensor([2, 3, 1, 9]), "group_size": 2}


def run(kind: str, p: dict, **more) -> dict:
    """One call and its gradient."""
    leaf, options = p["logits"].clone().requires_grad_(), {**p["options"], **more}
    logits = leaf * 1.0
    if p["name"] == "strided":
        logits = torch.stack([leaf, leaf], -1)[..., 0]
    if p["name"] == "in place of a slice":
        logits = torch.cat([logits, logits[:, :1]], 1)[:, :-1]
    memory = logits.data_ptr()
    if kind == "stats":
        out = gk.token_stats(logits, p["targets"], **options)
    elif kind == "score":
        out = gk.fused_entropy_score(logits, p["targets"], **spans(p), **options)
    else:
        advantages = ADVANTAGES if kind == "sega, given" else None
        out = gk.sega_loss(logits, p["targets"], advantages=advantages, **spans(p), **options)
    result = {k: v.detach().clone() for k, v in vars(out).items() if isinstance(v, torch.Tensor)}
    seen = []
    logits.register_hook(seen.append) if p["name"] == "in place" else None
    if hasattr(out, "loss"):
        (3.0 * out.loss).backward()
    else:
        torch.autograd.backward([out.logprobs, out.entropy], list(p["grads"]))
    assert all(x.data_ptr() == memory for x in seen) and len(seen) == (p["name"] == "in place")
    return {**result, "grad_logits": leaf.grad}


# The processes.


def errors(group, rank: int) -> dict[str, str]:
    p = given("uneven", "float32")
    mine, last = shard(p, rank), rank == WORLD - 1

    def call(changed, starts=None, **more):
        parallel = gk.VocabParallel(group, starts)
        return gk.token_stats(changed["logits"], changed["targets"], vocab_parallel=parallel, **more)

    outside = p["targets"].clone()
    outside[1, 1] = V
    wrong = {**mine, "logits": mine["logits"].double()} if last else mine
    other = {**mine, "targets": (p["targets"] + 1) % V} if last else mine
    return {
        "float64 logits on the last rank": error_of(call, wrong),
        "other targets on the last rank": error_of(call, other),
        "another ignore_index on the last rank": error_of(call, mine, ignore_index=-1 if last else -100),
        "a target past the vocabulary": error_of(call, {**mine, "targets": outside}),
        "vocab_starts of other shards": error_of(call, mine, (0, 2, 4, V + 9)),
    }


def process(folder: str) -> None:
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    results = {}
    for name, kind, dtype in CASES:
        mine, starts = shard(given(name, dtype), rank), (0, *itertools.accumulate(sizes_of(name)))
        for known in (None, starts):
            with Count() as count:
                found = run(kind, mine, vocab_parallel=gk.VocabParallel(group, known))
            results[known is not None, name, kind, dtype] = found, count.calls
    results["errors"] = errors(group, rank)
    alone = [dist.new_group([r]) for r in range(WORLD)][rank]
    whole = given("uneven", "float32")
    for starts in (None, (0, V), (0, V - 1)):
        parallel = gk.VocabParallel(alone, starts)
        results["alone", starts] = error_of(run, "stats", whole, vocab_parallel=parallel)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(made_once) -> list[dict]:
    """The results of each of the three processes."""
    build.load()  # compiled once, here, not by three processes
    folder = made_once("vocab_parallel_logits", lambda folder: run_ranks(WORLD, process, str(folder)))
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(WORLD)]


# The tests.


def exact(kind: str, p: dict) -> dict:
    """What `run` returns, in float64, by autograd through the specification."""
    z = p["logits"].double().requires_grad_()
    options = {k: v for k, v in p["options"].items() if k not in ("inplace_backward", "backend")}
    if "temperature" in options:
        options["temperature"] = options["temperature"].double()
    if kind == "stats":
        out = reference.token_stats(z, p["targets"], **options)
    else:
        advantages = ADVANTAGES.double() if kind == "sega, given" else None
        out = reference.sega_loss(z, p["targets"], advantages=advantages, **spans(p), **options)
    if kind.startswith("sega"):
        (3.0 * out.loss).backward()
    else:
        counted = p["targets"] if kind == "stats" else p["targets"].masked_fill(~p["mask"], options["ignore_index"])
        stats = reference.token_stats(z, counted, **options)
        torch.autograd.backward([stats.logprobs, stats.entropy], [g.double() for g in p["grads"]])
    found = {k: v.detach() for k, v in vars(out).items() if isinstance(v, torch.Tensor)}
    return {**found, "grad_logits": z.grad}


@pytest.mark.parametrize(("name", "kind", "dtype"), CASES)
def test_shards_give_the_numbers_of_the_whole_rows(ranks, name, kind, dtype):
    p = given(name, dtype)
    one = run(kind, p)
    true = exact(kind, p)
    parts = [ranks[r][False, name, kind, dtype][0] for r in range(WORLD)]
    got = {**parts[0], "grad_logits": torch.cat([part["grad_logits"] for part in parts], -1)}
    assert got.keys() == one.keys()
    for field, want in one.items():
        assert got[field].shape == want.shape and got[field].dtype == want.dtype, field
        if want.dtype == torch.bool:
            assert torch.equal(got[field], want), field
            continue
        eps = EPS[dtype] if field.startswith("grad") else 32 * EPS["float32"]
        assert_as_good(field, got[field], want, true[field], eps)
        if field != "grad_logits":  # on all ranks the same, to the bit
            for part in parts[1:]:
                torch.testing.assert_close(part[field], parts[0][field], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "kind", "dtype"), CASES)
def test_collectives(ranks, name, kind, dtype):
    """One gather of four numbers a row, and of one for each optional statistic; one exchange without `vocab_starts`;
    none in backward."""
    found, calls = ranks[0][False, name, kind, dtype]
    again, given_calls = ranks[0][True, name, kind, dtype]
    numbers = 4 + (len(EXTRA_STATS) if name == "extra" else 0)
    assert given_calls == [("gather", torch.float32, numbers * B * T)]
    assert calls[0][:2] == ("gather", torch.int64) and calls[0][2] <= 6 and calls[1:] == given_calls
    for field, value in found.items():
        torch.testing.assert_close(again[field], value, rtol=0, atol=0, equal_nan=True)


def test_special_rows(ranks):
    """A shard without a finite logit has no say; a row that is NaN in one shard is NaN; no other row is."""
    masked = [ranks[r][False, "masked", "stats", "float32"][0] for r in range(WORLD)]
    assert masked[0]["logprobs"][0, 1] == -torch.inf and masked[0]["entropy"].isfinite().all()
    assert (masked[1]["grad_logits"].abs().amax((0, 1)) > 0).sum() <= 1  # the word that was asked for, alone
    special = ranks[0][False, "special", "stats", "float32"][0]
    bad = torch.zeros(B, T, dtype=torch.bool)
    bad[1, 2] = bad[2, 3] = True
    assert torch.equal(special["entropy"].isnan(), bad) and torch.equal(special["logprobs"].isnan(), bad)


def test_wrong_arguments_stop_every_rank(ranks):
    expected = {
        "float64 logits on the last rank": ["`process_group`", f"ValueError on rank {WORLD - 1}"],
        "other targets on the last rank": ["`process_group`", "targets"],
        "another ignore_index on the last rank": ["`process_group`", "ignore_index"],
        "a target past the vocabulary": ["`targets`", f"[0, {V})", f"{V}"],
        "vocab_starts of other shards": ["`logits`", "as `vocab_starts` says"],
    }
    for rank in range(WORLD):
        found = ranks[rank]["errors"]
        assert found.keys() == expected.keys()
        for what, words in expected.items():
            if what.startswith("float64") and rank == WORLD - 1:
                words = ["`logits`", "float64"]
            assert all(word in found[what] for word in words), (rank, what, found[what])
        assert ranks[rank]["alone", None] == ranks[rank]["alone", (0, V)] == "no error"
        assert "`vocab_starts` must be (0, 67), as `logits` has it" in ranks[rank]["alone", (0, V - 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arguments_without_a_group(dtype):
    logits, targets = torch.zeros(3, 7, dtype=dtype), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"`vocab_parallel` must be a gem_kernels\.VocabParallel or None"):
        gk.token_stats(logits, targets, vocab_parallel=(0, 7))
    with pytest.raises(ValueError, match="`process_group`"):
        gk.token_stats(logits, targets, vocab_parallel=gk.VocabParallel(None))
