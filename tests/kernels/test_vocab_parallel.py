"""A vocabulary cut among 1, 2 and 4 gloo processes gives the numbers of the whole head in one process.

Four processes run every case on groups of 1, 2 and 4 ranks and leave the results in files; the tests read them. fp32
results must be those of the whole head up to the order of sums. bf16 results may err, against fp32 on the same numbers,
twice what the whole head errs in bf16, plus rounding.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.distributed as dist

import gem_kernels as gk
from gem_kernels import reference
from gem_kernels.backends.cpu import build
from gem_kernels.backends.cpu import row_stats as cpu
from gem_kernels.backends.types import NO_TARGET, RowGradients, RowOptions
from tests.kernels.helpers import assert_near, empty_stats, room
from tests.processes import run_ranks

WORLD = 4
KINDS = ("stats", "score", "policy", "sega_one_shot", "sega_two_phase", "sega_frozen")
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8}
B, T, V, D = 4, 6, 67, 12
CHUNK = 5  # rows; of the largest shard
EVEN = {1: [68], 2: [34, 34], 4: [17, 17, 17, 17]}
UNEVEN = {1: [67], 2: [23, 44], 4: [20, 1, 30, 16]}


# The cases.


def problem(name: str, dtype: str = "float32") -> dict:
    """The whole head. `masked` has no probability in words 20..39, of which 4 ranks have a shard (below: MASKED)."""
    generator = torch.Generator().manual_seed(5)
    n_words = 68 if name == "even" else V

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, weight, bias = normal(B, T, D), normal(n_words, D), normal(n_words)
    targets = torch.randint(0, n_words, (B, T), generator=generator)
    mask = torch.arange(T) < torch.tensor([6, 4, 5, 6])[:, None]
    options = {"temperature": 0.5 + torch.rand(B, T, generator=generator), "softcap": 20.0, "logit_scale": 1.5}
    options["ignore_index"] = -100
    if name == "ignore":  # a number that words of every shard have
        options["ignore_index"] = 0
        targets[0, :3], targets[1, 2] = 0, 0
    if name == "plain":
        options, bias = {"ignore_index": -100, "workspace_bytes": None}, None
    if name == "long":  # a row of statistics is small beside a row of logits
        weight, bias, options = normal(4000, D), None, {"ignore_index": -100}
    if name == "masked":
        bias[20:40] = -torch.inf
        targets = torch.where((targets >= 20) & (targets < 40), 3, targets)
        targets[0, 1] = 25  # log-prob -inf
    if name == "special":
        hidden[..., 0], weight[:, 0] = 0, 0
        weight[31, 0], hidden[1, 2, 0] = 3e38, 1e4  # +inf in one shard: that row is NaN, no other
        hidden[2, 3, 1] = torch.nan
        options = {"ignore_index": -100}
    if name == "confident":
        # One word some 20 nats above the rest, in each of the shards by turns.
        weight = torch.nn.functional.normalize(weight, dim=1)
        best = torch.arange(B * T).view(B, T) * 5 % n_words
        hidden, bias = 40.0 * weight[best], None
        targets, options = torch.where(torch.rand(B, T, generator=generator) < 0.7, best, targets), {}
        options["ignore_index"] = -100
    grads = normal(2, B, T)
    cast = getattr(torch, dtype)
    of_head = torch.float32 if name == "mixed" else cast
    bias = None if bias is None else bias.to(of_head)
    head = {"hidden": hidden.to(cast), "weight": weight.to(of_head), "bias": bias, "targets": targets}
    if name == "mixed":
        options["compute_dtype"] = cast
    return {**head, "mask": mask, "options": options, "grads": grads}


MASKED = {1: [67], 2: [40, 27], 4: [20, 20, 10, 17]}
LONG = {k: [4000 // k] * k for k in (1, 2, 4)}
SIZES = {"even": EVEN, "masked": MASKED, "long": LONG}
CASES = [(name, kind, "float32") for name in ("uneven", "ignore") for kind in KINDS]
CASES += [("even", kind, "bfloat16") for kind in KINDS] + [("uneven", kind, "bfloat16") for kind in KINDS]
CASES += [("plain", "policy", dtype) for dtype in EPS] + [("plain", "stats", "bfloat16"), ("even", "policy", "float32")]
CASES += [("long", kind, "float32") for kind in ("stats", "policy")]
CASES += [(name, kind, "float32") for name in ("masked", "special", "confident") for kind in ("stats", "policy")]
CASES += [("unreduced", kind, "float32") for kind in KINDS]
CASES += [("mixed", kind, "bfloat16") for kind in ("stats", "policy", "sega_two_phase")]
# Those that also run with `vocab_starts`.
STARTS = [("uneven", kind, "bfloat16") for kind in KINDS]


def policy(logprobs, entropy, *, old, advantages):
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(0.8, 1.2)
    return -(torch.min(ratio * advantages, clipped * advantages) + 0.1 * entropy).sum()


def run(kind: str, p: dict, rows: int = 10_000, backward: bool = True, **more) -> dict:
    """One call and its gradients. `rows` bounds the chunk."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in (p["hidden"], p["weight"], p["bias"])]
    hidden, weight, bias = leaves
    if kind == "sega_frozen":
        for x in leaves[1:]:
            _ = x is None or x.requires_grad_(False)
    options = {"bias": bias, "workspace_bytes": rows, **p["options"], **more}
    spans = {"completion_mask": p["mask"], "answer_start": torch.tensor([2, 3, 1, 9]), "group_size": 2}
    if kind == "stats":
        out = gk.linear_token_stats(hidden, weight, p["targets"], **options)
    elif kind == "score":
        out = gk.fused_linear_entropy_score(hidden, weight, p["targets"], **spans, **options)
    elif kind == "policy":
        inputs = {"old": p["grads"][0] - 4, "advantages": p["grads"][1]}
        out = gk.fused_linear_policy_loss(hidden, weight, p["targets"], policy, token_inputs=inputs, **options)
    else:
        out = gk.fused_linear_sega_loss(hidden, weight, p["targets"], **spans, **options)
        assert out.path == {"sega_two_phase": "two_phase"}.get(kind, "one_shot"), out.path
    result = {k: v.detach() for k, v in vars(out).items() if isinstance(v, torch.Tensor)}
    if backward:
        if hasattr(out, "loss"):
            (3.0 * out.loss).backward()
        else:
            torch.autograd.backward([out.logprobs, out.entropy], list(p["grads"]))
        result |= {
            f"grad_{n}": x.grad
            for n, x in zip(("hidden", "weight", "bias"), leaves)
            if x is not None and x.requires_grad
        }
    return result


def workspace(kind: str, p: dict, largest: int) -> int:
    """For chunks of CHUNK rows, or of all rows where a chunk must hold a group."""
    rows = 2 * T if kind == "sega_one_shot" else CHUNK
    return room(largest, rows, p["hidden"].dtype)


def shard(p: dict, sizes: list[int], rank: int) -> dict:
    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return {**p, "weight": p["weight"][part], "bias": None if p["bias"] is None else p["bias"][part]}


# The processes.


class Count:
    """Calls of the collectives, by name, and the numbers each rank sends."""

    def __enter__(self):
        self.calls, self.original = [], {}
        for name in ("all_gather_single", "all_gather_into_tensor", "all_reduce"):
            if hasattr(dist, name):
                self.original[name] = getattr(dist, name)
                setattr(dist, name, functools.partial(self._called, name))
        return self

    def _called(self, name, *args, **kwargs):
        sent = args[0] if name == "all_reduce" else args[1]
        self.calls.append((name.split("_", 2)[1], sent.dtype, sent.numel()))
        return self.original[name](*args, **kwargs)

    def __exit__(self, *_):
        for name, function in self.original.items():
            setattr(dist, name, function)


def error_of(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except ValueError as e:
        return str(e)
    return "no error"


def errors(group, rank: int, k: int) -> dict[str, str]:
    p = problem("uneven")
    mine = shard(p, UNEVEN[k], rank)
    last = rank == k - 1

    def call(p, rows=10_000, starts=None):
        return run("stats", p, rows, backward=False, vocab_parallel=gk.VocabParallel(group, starts))

    outside, missing = p["targets"].clone(), p["targets"].clone()
    outside[1, 1], missing[1, 1] = V, -7
    starts = (0, *itertools.accumulate(UNEVEN[k]))
    found = {}
    narrow = {**mine, "bias": torch.zeros(mine["weight"].shape[0] + 1)} if last else mine
    plain = {**mine, "options": {}}
    fewer = {**plain, "hidden": p["hidden"][:3], "targets": p["targets"][:3]}
    other = {**plain, "targets": (p["targets"] + 1) % V}
    found["a wrong bias on the last rank"] = error_of(call, narrow)
    found["a target past the vocabulary"] = error_of(call, {**mine, "targets": outside})
    found["a negative target"] = error_of(call, {**mine, "targets": missing})
    found["fewer tokens on the last rank"] = error_of(call, fewer if last else plain)
    found["other targets on the last rank"] = error_of(call, other if last else plain)
    found["another workspace on the last rank"] = error_of(call, plain, rows=999 if last else 1000)
    found["vocab_starts of another group"] = error_of(call, plain, starts=(0, 1, *starts))
    found["vocab_starts of other shards"] = error_of(call, plain, starts=(*range(0, 2 * k, 2), V + 9))
    found["vocab_starts that fall"] = error_of(call, plain, starts=(0, *reversed(starts[1:])))
    return found


class Gather(torch.autograd.Function):
    """Sequence parallelism: each rank's rows -> all rows. Backward is a reduce_scatter."""

    @staticmethod
    def forward(ctx, rows, group):
        ctx.group, ctx.n = group, len(rows)
        out = [torch.empty_like(rows) for _ in range(group.size())]
        dist.all_gather(out, rows, group=group)
        return torch.cat(out)

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.group.rank() * ctx.n :][: ctx.n], None


def sequence_parallel(group, rank: int, k: int, reduces: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of this rank's rows of hidden states, and of its shard."""
    p = problem("uneven")
    mine = shard(p, UNEVEN[k], rank)
    rows = p["hidden"].flatten(0, 1).chunk(k)[rank].clone().requires_grad_()
    parallel = gk.VocabParallel(group, reduce_hidden_grad=reduces)
    weight = mine["weight"].clone().requires_grad_()
    out = gk.linear_token_stats(Gather.apply(rows, group), weight, p["targets"].flatten(), vocab_parallel=parallel)
    (out.logprobs * p["grads"][0].flatten() + out.entropy).sum().backward()
    return rows.grad, weight.grad


def process(folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = {WORLD: dist.group.WORLD}
    for k in (1, 2):
        of = [dist.new_group(list(range(r, r + k))) for r in range(0, WORLD, k)]
        groups[k] = of[rank // k]
    results = {}
    for k, group in groups.items():
        at = dist.get_rank(group)
        for name, kind, dtype in CASES:
            p, sizes = problem(name, dtype), SIZES.get(name, UNEVEN)[k]
            mine, bound = shard(p, sizes, at), workspace(kind, p, max(sizes))
            with Count() as count:
                parallel = gk.VocabParallel(group, reduce_hidden_grad=name != "unreduced")
                out = run(kind, mine, bound, vocab_parallel=parallel)
            starts = (0, *itertools.accumulate(sizes))
            results[k, name, kind, dtype] = out
            results["calls", k, name, kind, dtype] = count.calls
            if (name, kind, dtype) in STARTS:
                with Count() as count:
                    again = run(kind, mine, bound, vocab_parallel=gk.VocabParallel(group, starts))
                same = (torch.equal(x, again[field]) for field, x in out.items())
                results["given", k, name, kind, dtype] = all(same), count.calls
        results["errors", k] = errors(group, at, k)
        results["gathered", k] = [sequence_parallel(group, at, k, reduces) for reduces in (False, True)]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(made_once) -> list[dict]:
    """The results of each of the four processes."""
    build.load()  # compiled once, here, not by four processes
    folder = made_once("vocab_parallel", lambda folder: run_ranks(WORLD, process, str(folder)))
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(WORLD)]


# The tests.


def whole(ranks, k, name, kind, dtype) -> dict:
    """The results of the first group of k ranks; shards' gradients put together."""
    parts = [ranks[r][k, name, kind, dtype] for r in range(k)]
    for part in parts[1:]:
        for field in part:
            if field not in ("grad_weight", "grad_bias") and (name, field) != ("unreduced", "grad_hidden"):
                torch.testing.assert_close(part[field], parts[0][field], rtol=0, atol=0, equal_nan=True)
    local = {x: torch.cat([part[x] for part in parts]) for x in ("grad_weight", "grad_bias") if x in parts[0]}
    if name == "unreduced":
        local["grad_hidden"] = sum(part["grad_hidden"] for part in parts)
    return {**parts[0], **local}


def assert_as_good(field, got, one, exact, eps):
    """Against `exact`: at most twice the error of `one`, plus rounding of the largest number there."""
    got, one, exact = got.double(), one.double(), exact.double()
    special = ~exact.isfinite()
    torch.testing.assert_close(got[special], exact[special], rtol=0, atol=0, equal_nan=True, msg=field)
    got, one, exact = (torch.where(special, 0.0, x) for x in (got, one, exact))
    scale = exact.abs().max()
    budget = 2 * (one - exact).abs().max() + eps * scale + 1e-30
    error = (got - exact).abs().max()
    assert error <= budget, f"{field}: error {error:.3g}, {error / budget:.2f} of the budget; scale {scale:.3g}"


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize(("name", "kind", "dtype"), CASES)
def test_shards_give_the_numbers_of_the_whole_head(ranks, k, name, kind, dtype):
    p = problem(name, dtype)
    bound = workspace(kind, p, p["weight"].shape[0])
    got, one = whole(ranks, k, name, kind, dtype), run(kind, p, bound)
    assert got.keys() == one.keys()
    p32 = problem(name, dtype)
    p32["options"].pop("compute_dtype", None)
    p32 = {**p32, **{x: None if p32[x] is None else p32[x].float() for x in ("hidden", "weight", "bias")}}
    exact = run(kind, p32, 2 * bound) if dtype == "bfloat16" else one
    for field in got:
        assert got[field].shape == one[field].shape and got[field].dtype == one[field].dtype, field
        if got[field].dtype == torch.bool:
            assert torch.equal(got[field], one[field]), field
        else:
            eps = EPS[dtype] if dtype == "bfloat16" and field.startswith("grad") else 32 * EPS["float32"]
            assert_as_good(field, got[field], one[field], exact[field], eps)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_special_rows(ranks, k):
    """A shard without a finite logit has no say; a row that is NaN in one shard is NaN; no other row is."""
    masked = whole(ranks, k, "masked", "stats", "float32")
    assert masked["logprobs"][0, 1] == -torch.inf and masked["logprobs"].isfinite().sum() == B * T - 1
    assert masked["entropy"].isfinite().all() and masked["grad_hidden"].isfinite().all()
    assert (masked["grad_weight"][20:40].abs().amax(1) > 0).sum() <= 1  # the word that was asked for, alone
    special = whole(ranks, k, "special", "stats", "float32")
    bad = torch.zeros(B, T, dtype=torch.bool)
    bad[1, 2] = bad[2, 3] = True
    for field in ("logprobs", "entropy"):
        assert torch.equal(special[field].isnan(), bad), field
    assert torch.equal(special["grad_hidden"].isnan().all(-1), bad)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_confident_rows_keep_their_digits(ranks, k):
    p = problem("confident")
    logits = p["hidden"].double() @ p["weight"].double().t()
    exact = reference.token_stats(logits, p["targets"])
    got = whole(ranks, k, "confident", "stats", "float32")
    assert exact.entropy.min() < 1e-6
    # The logits, up to 40 here, are float32 themselves: an error of 1e-5 in each. 1e-14: float64's own, of 1 + s.
    torch.testing.assert_close(got["entropy"].double(), exact.entropy, rtol=2e-4, atol=1e-14)
    torch.testing.assert_close(got["logprobs"].double(), exact.logprobs, rtol=2e-4, atol=1e-14)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_collectives(ranks, k, kind):
    """One gather of [4, n] a chunk, one reduction of [n, D] a chunk, one exchange without `vocab_starts`; no others."""
    calls = ranks[0]["calls", k, "uneven", kind, "bfloat16"]
    same, given = ranks[0]["given", k, "uneven", kind, "bfloat16"]
    assert same
    assert calls[0][:2] == ("gather", torch.int64) and calls[0][2] <= 13 and calls[1:] == given
    rows = B * T if kind in ("stats", "policy") else int(problem("uneven")["mask"].sum())
    chunks = [10, 11] if kind == "sega_one_shot" else [CHUNK] * (rows // CHUNK) + [rows % CHUNK]
    if kind == "sega_frozen":  # of each group, what is over first
        chunks = [n for rows in (10, 11) for n in [rows % CHUNK] * (rows % CHUNK > 0) + [CHUNK] * (rows // CHUNK)]
    gathers = [("gather", torch.float32, 4 * n) for n in chunks]
    sums = [("reduce", torch.float32, n * D) for n in chunks]
    if kind in ("policy", "sega_one_shot", "sega_frozen"):
        assert given == [x for pair in zip(gathers, sums) for x in pair]
    else:
        assert given == gathers + sums


@pytest.mark.parametrize("k", [2, 4])
def test_no_reduction_where_none_is_wanted(ranks, k):
    for kind in KINDS:
        calls = [ranks[0]["calls", k, name, kind, "float32"] for name in ("uneven", "unreduced")]
        assert [x for x in calls[0] if x[0] == "gather"] == calls[1]
        assert any(x[0] == "reduce" for x in calls[0])


@pytest.mark.parametrize("k", [1, 2, 4])
def test_sequence_parallelism_reduces_once(ranks, k):
    """Left unreduced, the gather's backward makes the gradient right; reduced twice, it counts once for each rank."""
    p = problem("uneven")
    hidden, weight = (p[x].flatten(0, -2).clone().requires_grad_() for x in ("hidden", "weight"))
    out = gk.linear_token_stats(hidden, weight, p["targets"].flatten())
    (out.logprobs * p["grads"][0].flatten() + out.entropy).sum().backward()
    for i, times in enumerate((1, k)):
        found = [ranks[r]["gathered", k][i] for r in range(k)]
        assert_near(torch.cat([x for x, _ in found]), times * hidden.grad)
        assert_near(torch.cat([x for _, x in found]), weight.grad)


@pytest.mark.parametrize("k", [2, 4])
def test_statistics_of_all_chunks_travel_together(ranks, k):
    """Where the workspace has room for them: of five chunks, one gather."""
    assert [x for x in ranks[0]["calls", k, "long", "stats", "float32"][1:] if x[0] == "gather"] == [
        ("gather", torch.float32, 4 * B * T)
    ]


def test_a_group_of_one_is_the_plain_path(ranks):
    for case in CASES:
        assert ranks[0][("calls", 1, *case)] == []


@pytest.mark.parametrize("k", [2, 4])
def test_wrong_arguments_stop_every_rank(ranks, k):
    expected = {
        "a wrong bias on the last rank": ["`process_group`", "ValueError on rank"],
        "a target past the vocabulary": ["`targets`", f"[0, {V})", f"{V}"],
        "a negative target": ["`targets`", "-7"],
        "fewer tokens on the last rank": ["`process_group`", "number of tokens"],
        "other targets on the last rank": ["`process_group`", "targets"],
        "another workspace on the last rank": ["`process_group`", "workspace_bytes"],
        "vocab_starts of another group": ["`vocab_starts`", f"{k + 1} integers"],
        "vocab_starts of other shards": ["`weight`"],
        "vocab_starts that fall": ["`vocab_starts`", "increasing"],
    }
    for rank in range(k):
        found = ranks[rank]["errors", k]
        assert found.keys() == expected.keys()
        for what, words in expected.items():
            if what == "a wrong bias on the last rank" and rank == k - 1:
                words = ["`bias`"]
            assert all(word in found[what] for word in words), (rank, what, found[what])


def test_arguments_without_a_group():
    p = problem("uneven")
    with pytest.raises(ValueError, match=r"`vocab_parallel` must be a gem_kernels\.VocabParallel or None"):
        run("stats", p, vocab_parallel=(0, V))
    with pytest.raises(ValueError, match=r"`reduce_hidden_grad` must be True or False"):
        run("stats", p, vocab_parallel=gk.VocabParallel(None, reduce_hidden_grad=1))
    for group in (None, "world"):
        with pytest.raises(ValueError, match="`process_group`"):
            run("stats", p, vocab_parallel=gk.VocabParallel(group, (0, V)))


# The row kernels' part: a target that is elsewhere.


def check_no_target(forward, backward):
    """forward(logits, targets), backward(logits, targets, RowGradients) -> gradient."""
    generator = torch.Generator().manual_seed(2)
    n, words = 6, 301
    logits = 3 * torch.randn(1, n, words, generator=generator)
    logits[0, 2] = -torch.inf
    logits[0, 3, 7] = torch.nan
    logits[0, 4, ::2] = -torch.inf
    logits[0, 5] = torch.finfo(torch.float32).min
    logits[0, 5, 7] = torch.nan
    targets = torch.tensor([3, 300, 3, 3, 1, 2])
    nowhere = torch.full((n,), NO_TARGET)
    with_target, without = forward(logits, targets), forward(logits, nowhere)
    assert without[0].isnan().all()
    for x, y in zip(with_target[1:], without[1:]):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    # All masked, and poisoned, are told apart.
    assert without[2][2] <= -1e30 and not (without[2][3] <= -1e30) and not (without[2][5] <= -1e30)
    a, b = torch.randn(2, n, generator=generator).unbind()
    stats = RowGradients(*with_target[1:], a, b)
    one_hot = torch.zeros(n, words).scatter_(1, targets[:, None], a[:, None])
    expected = backward(logits, targets, stats) - one_hot
    assert_near(backward(logits, nowhere, stats), expected)
    for outside in (-1, words):
        wrong = torch.full((n,), outside)
        assert all(forward(logits, wrong)[i].isnan().all() for i in (0, 1, 3))


@pytest.mark.parametrize(
    "compiled", [pytest.param(True, marks=pytest.mark.skipif(build.load() is None, reason="no compiler")), False]
)
def test_row_kernels_without_a_target(compiled):
    options = RowOptions(backend="cpu" if compiled else "torch")

    def forward(logits, targets):
        return cpu.row_stats_forward(logits, targets, options, empty_stats(len(targets)))

    def backward(logits, targets, stats):
        grad = torch.full_like(logits, torch.nan)
        cpu.row_stats_backward(grad, logits, targets, options, stats)
        return grad[0]

    check_no_target(forward, backward)


@pytest.mark.parametrize("splits", [1, 3])
def test_triton_row_kernels_without_a_target(splits, device):
    pytest.importorskip("triton")
    from gem_kernels.backends.triton import launch

    def forward(logits, targets):
        out = launch.row_stats_forward(
            logits.to(device), targets.to(device), RowOptions(), empty_stats(len(targets), device), splits
        )
        return tuple(x.cpu() for x in out)

    def backward(logits, targets, stats):
        logits, targets, stats = logits.to(device), targets.to(device), RowGradients(*(x.to(device) for x in stats))
        grad = torch.full_like(logits, torch.nan)
        launch.row_stats_backward(grad, logits, targets, RowOptions(), stats, splits)
        return grad[0].cpu()

    check_no_target(forward, backward)
