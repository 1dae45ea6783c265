"""fused_linear_sega_loss and fused_linear_policy_loss against float64 autograd through the full logits.

One shot, two phase and the full logits are three ways to the same numbers, and so is a batch cut into micro-batches.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import gem_kernels
from gem_kernels import reference
from tests.kernels.helpers import (
    IGNORE,
    LINEAR_BACKENDS,
    SPAN,
    assert_all_within_budget,
    assert_near,
    distance,
    good,
    needs_backend,
    paths,
    policy,
    problem,
    room,
    sequences,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LOSS_TYPES = ("sum", "mean", "token", "constant")
# V = 203, float32: all rows, one group but not two, five rows, one row.
WORKSPACES = {"all rows": 1 << 20, "one group": room(203, 45), "five rows": room(203, 5), "one row": 1}
GIVEN = torch.tensor([-2.0, 0.5, 1.0, 3.0, -1.0, 0.25])


def gradients(loss, leaves) -> dict:
    loss.backward()
    return {"loss": loss, **{name: leaf.grad for name, leaf in leaves.items()}}


def sega(p, layout, **options):
    leaves = p.leaves()
    out = gem_kernels.fused_linear_sega_loss(targets=p.targets, **leaves, **p.options, **layout, **options)
    assert out.loss.dtype == torch.float32 and out.loss.shape == ()
    return gradients(out.loss, leaves), out


def sega_reference(p, layout, dtype, **options):
    leaves = p.leaves(dtype)
    logits, row_options = p.eager(torch.float64 if dtype == torch.float64 else torch.float32, **leaves)
    out = reference.sega_loss(logits, p.targets, **layout, **row_options, **options)
    return gradients(out.loss, leaves), out


def score_condition(truth, group_size: int) -> float:
    """Advantages are differences of scores: the size of the scores over that of their differences, at the worst."""
    score, valid = truth.score.view(-1, group_size), truth.valid.view(-1, group_size)
    worst = 1.0
    for s, ok in zip(score, valid):
        if int(ok.sum()) > 1:
            worst = max(worst, float(s[ok].abs().max() / (s[ok] - s[ok].mean()).abs().max().clamp(min=1e-30)))
    return worst


def loss_terms(layout, truth) -> float:
    """Of loss_type "sum": sum |A_i logprob_it| / Z."""
    per_token = truth.logprobs.abs()
    if "completion_mask" in layout:
        per_sequence = (per_token * layout["completion_mask"]).sum(1)
    else:
        offsets = layout["cu_seqlens"].tolist()
        per_sequence = truth.score.new_tensor([per_token[b:e].sum() for b, e in itertools.pairwise(offsets)])
    return float((truth.advantages.abs() * per_sequence)[truth.valid].sum() / max(1, int(truth.valid.sum())))


def check_sega(p, layout, *, options=None, **head):
    options = options or {}
    got, out = sega(p, layout, **options, **head)
    exact, truth = sega_reference(p, layout, torch.float64, **options)
    eager, _ = sega_reference(p, layout, p.hidden.dtype, **options)
    sizes = {"loss": loss_terms(layout, truth)} if options.get("loss_type", "sum") == "sum" else {}
    condition = 1.0 if "advantages" in options else score_condition(truth, layout["group_size"])
    assert_all_within_budget(got, eager, exact, p.hidden.dtype, sizes=sizes, condition=condition)
    assert torch.equal(out.valid, truth.valid)
    return got, out


@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_one_shot_two_phase_and_full_logits_agree(loss_type, layout, device):
    p, layout = sequences(device)[layout]
    options = {"loss_type": loss_type, "max_completion_length": 17}
    chosen = {}
    for name, workspace_bytes in WORKSPACES.items():
        got, out = check_sega(p, layout, options=options, workspace_bytes=workspace_bytes)
        chosen[name] = out.path
        for other in ("score", "final_entropy", "fork_entropy", "advantages", "logprobs", "entropy"):
            expected = getattr(sega_reference(p, layout, torch.float64, **options)[1], other)
            assert distance(getattr(out, other), expected) < 1e-5, other
            assert not getattr(out, other).requires_grad
    assert chosen == {"all rows": "one_shot", "one group": "one_shot", "five rows": "two_phase", "one row": "two_phase"}
    leaves = p.leaves()
    logits, _ = p.eager(torch.float32, **leaves)
    full = gem_kernels.sega_loss(logits, p.targets, **layout, **options)
    for name, value in gradients(full.loss, leaves).items():
        assert distance(got[name], value) < 1e-5, name


@pytest.mark.parametrize("layout", [0, 1], ids=["padded", "packed"])
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_given_advantages_go_in_one_shot_whatever_the_workspace(workspace, layout, device):
    p, layout = sequences(device)[layout]
    layout = {k: v for k, v in layout.items() if k in ("completion_mask", "cu_seqlens")}
    options = {"advantages": GIVEN.to(device), "loss_type": "mean"}
    _, out = check_sega(p, layout, options=options, workspace_bytes=WORKSPACES[workspace])
    assert out.path == "one_shot"
    assert out.advantages.tolist() == [a * v for a, v in zip(GIVEN.tolist(), out.valid.tolist())]


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
@pytest.mark.parametrize("workspace", ["one group", "five rows"])
def test_sega_backends(backend, workspace, device):
    needs_backend(backend, device)
    for layout in (0, 1):
        p, span = sequences(device)[layout]
        check_sega(p, span, backend=backend, workspace_bytes=WORKSPACES[workspace])


@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=["rounded logits", "float32 logits"])
@pytest.mark.parametrize("workspace", ["all rows", "five rows"])
def test_sega_bfloat16(workspace, logits_dtype, device):
    p, layout = sequences(device, dtype=torch.bfloat16, D=64, V=1300)[0]
    options = {"advantages": GIVEN.to(device)}
    check_sega(p, layout, options=options, logits_dtype=logits_dtype, workspace_bytes=WORKSPACES[workspace])
    # With advantages of its own the loss is a difference of near-equal sums: compared to the path through full logits.
    got, out = sega(p, layout, logits_dtype=logits_dtype, workspace_bytes=1 << 20)
    exact, truth = sega_reference(p, layout, torch.float64)
    assert distance(out.advantages, truth.advantages) < 0.05
    assert all(distance(got[name], exact[name]) < 0.06 for name in ("hidden", "weight", "bias"))


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"logit_scale": 0.3}, {"temperature": 0.7}], ids=str)
@pytest.mark.parametrize("workspace", ["one group", "five rows"])
def test_sega_softcap_scale_temperature(workspace, options, device):
    p, layout = sequences(device, **options)[0]
    check_sega(p, layout, workspace_bytes=WORKSPACES[workspace])


def test_sega_mappings_scales_and_validity(device):
    p, layout = sequences(device)[0]
    layout["valid"] = torch.tensor([True, True, False, True, True, True], device=device)
    for mapping in ("identity", "softmax", "rank"):
        for scale in ("none", "group"):
            options = {"mapping": mapping, "scale": scale, "no_answer": "exclude"}
            for workspace in ("one group", "five rows"):
                _, out = check_sega(p, layout, options=options, workspace_bytes=WORKSPACES[workspace])
            assert out.valid.tolist() == [True, True, False, False, False, True]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("workspace", ["one group", "five rows"])
def test_micro_batches_with_the_denominator_are_one_batch(workspace, loss_type, device):
    p, layout = sequences(device)[0]
    options = {"loss_type": loss_type, "max_completion_length": 17, "workspace_bytes": WORKSPACES[workspace]}
    whole, out = sega(p, layout, **options)
    counted = layout["completion_mask"] & (p.targets != IGNORE) & out.valid[:, None]
    n_valid = int(out.valid.sum())
    denominator = {"token": int(counted.sum()), "constant": n_valid * 17}.get(loss_type, n_valid)
    leaves = p.leaves()
    total = 0.0
    for begin, z in ((0, denominator), (3, torch.tensor(float(denominator), device=device))):
        part = slice(begin, begin + 3)
        cut = {k: v[part] if isinstance(v, torch.Tensor) else v for k, v in layout.items()}
        hidden, targets = leaves["hidden"][part], p.targets[part]
        total = (
            total
            + gem_kernels.fused_linear_sega_loss(
                hidden, leaves["weight"], targets, bias=leaves["bias"], **cut, **options, denominator=z
            ).loss
        )
    for name, value in gradients(total, leaves).items():
        assert distance(value, whole[name]) < 1e-5, name


# Any loss of (logprob, entropy).

CLIP, BETA, BONUS = 0.2, 0.04, 0.01


def grpo(logprobs, entropy, old, reference_logprobs, advantages, weights):
    """GRPO: clipped ratio, KL to a reference by the k3 estimator, entropy bonus; weights hold 1/(len B)."""
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    log_ratio = reference_logprobs - logprobs
    kl = log_ratio.exp() - log_ratio - 1
    return -((gain - BETA * kl + BONUS * entropy) * weights).sum()


def grpo_inputs(p, logprobs) -> dict:
    generator = torch.Generator().manual_seed(4)

    def noise():
        return 0.4 * torch.randn(p.targets.shape, generator=generator).to(logprobs)

    old, other = logprobs.detach() + noise(), logprobs.detach() + noise()
    kept = p.targets != IGNORE
    weights = kept / (kept.sum(1, keepdim=True).clamp(min=1) * p.targets.shape[0])
    advantages = torch.randn(p.targets.shape[0], 1, generator=generator).to(logprobs).expand(p.targets.shape)
    return {"old": old, "reference_logprobs": other, "advantages": advantages, "weights": weights}


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
@pytest.mark.parametrize("workspace_bytes", [1 << 20, room(257, 6), 1], ids=["whole", "six rows", "one row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grpo_with_clipping_kl_and_entropy_bonus(dtype, workspace_bytes, backend, device):
    needs_backend(backend, device)
    p = problem(4, 5, dtype=dtype, device=device, softcap=20.0, ignored=0.3)
    results = []
    inputs = None
    for kind in (torch.float64, dtype):
        leaves = p.leaves(kind)
        logits, options = p.eager(torch.float64 if kind == torch.float64 else torch.float32, **leaves)
        stats = reference.token_stats(logits, p.targets, **options)
        inputs = inputs or {k: v.float() for k, v in grpo_inputs(p, stats.logprobs).items()}
        given = {k: v.to(stats.logprobs.dtype) for k, v in inputs.items()}
        results.append(gradients(grpo(stats.logprobs, stats.entropy, **given), leaves))
        if kind == torch.float64:
            ratio = (stats.logprobs - given["old"]).exp()
            clipped = (ratio - 1).abs() > CLIP
            assert 0.1 < clipped[p.targets != IGNORE].double().mean() < 0.9  # both branches are taken
    leaves = p.leaves()
    options = {"workspace_bytes": workspace_bytes, "backend": backend, "logits_dtype": torch.float32}
    out = gem_kernels.fused_linear_policy_loss(
        targets=p.targets, token_loss=grpo, token_inputs=inputs, **leaves, **p.options, **options
    )
    ours = gradients(out.loss, leaves)
    # A softcapped logit, from one approximate exponential, errs by up to five roundings of c / 2; eager's tanh by one.
    assert_all_within_budget(ours, results[1], results[0], dtype, condition=2.0)
    stats = gem_kernels.linear_token_stats(targets=p.targets, **leaves, **p.options, **options)
    assert torch.equal(out.logprobs, stats.logprobs) and torch.equal(out.entropy, stats.entropy)


def test_token_inputs_follow_their_rows(device):
    """Each token's input is its own number, in one, two and many chunks, with trailing axes."""
    p = problem(3, 7, ignored=0.4, device=device)
    index = torch.arange(21, device=device).view(3, 7)
    pair = torch.stack([index, -index], -1)
    seen = []

    def token_loss(logprobs, entropy, index, pair):
        assert pair.shape == (*logprobs.shape, 2) and entropy.shape == logprobs.shape
        assert torch.equal(pair[:, 1], -index)
        seen.append(index)
        return (index * logprobs).sum()

    kept = p.targets.view(-1) != IGNORE
    for rows in (1, 4, 100):
        seen.clear()
        out = gem_kernels.fused_linear_policy_loss(
            p.hidden,
            p.weight,
            p.targets,
            token_loss,
            token_inputs={"index": index, "pair": pair},
            workspace_bytes=room(257, rows),
        )
        expected = index.view(-1)[kept] if device.type == "cpu" else index.view(-1)
        assert torch.equal(torch.cat(seen), expected)
        assert max(map(len, seen)) <= rows
        assert abs(out.loss - (index * out.logprobs).sum()) <= 2.0**-21 * (index * out.logprobs).abs().sum()


@pytest.mark.parametrize(
    "token_loss",
    [lambda logprobs, entropy: -logprobs.sum(), lambda logprobs, entropy: entropy.sum(), lambda x, y: x.new_ones(())],
    ids=["logprobs alone", "entropy alone", "neither"],
)
def test_token_loss_may_leave_out_either(token_loss, device):
    p = problem(8, ignored=0.0, device=device)
    results = []
    for kind in (torch.float32, torch.float64):
        leaves = p.leaves(kind)
        if kind == torch.float32:
            loss = gem_kernels.fused_linear_policy_loss(targets=p.targets, token_loss=token_loss, **leaves).loss
        else:
            logits, _ = p.eager(kind, **leaves)
            stats = reference.token_stats(logits, p.targets)
            loss = token_loss(stats.logprobs, stats.entropy) + 0.0 * logits.sum()
        results.append(gradients(loss, leaves))
    for name, exact in results[1].items():
        assert distance(results[0][name], exact) < 1e-5 if exact.any() else not results[0][name].any(), name


def test_bad_token_loss_and_inputs(device):
    p = problem(5, device=device)
    for token_loss in (None, lambda x, y: x, lambda x, y: 1.0, lambda x, y: None):
        with pytest.raises(ValueError, match=r"^`token_loss` must be .*, got "):
            gem_kernels.fused_linear_policy_loss(p.hidden, p.weight, p.targets, token_loss)
    for value in (1.0, torch.zeros(4, device=device), torch.zeros(5, device=device).requires_grad_()):
        with pytest.raises(ValueError, match=r"^`token_inputs\['old'\]` must be .*, got "):
            gem_kernels.fused_linear_policy_loss(p.hidden, p.weight, p.targets, policy, token_inputs={"old": value})


# What both losses share: how their backward behaves, and where there is nothing to do.

LOSSES = ("sega, given advantages", "sega, two phase", "policy")


@pytest.mark.parametrize("path", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_upstream_scalar_is_applied(path, dtype, device):
    """1/3 and a loss scale of 2^17 (above the largest float16) too: a scalar rounded to float16 would be infinite."""
    p = problem(12, dtype=dtype, device=device, ignored=0.0)
    grads = []
    for scale in (1.0, 2.0, 1 / 3, 2.0**17):
        leaves = p.leaves()
        # The loss is made small, so that the scaled gradient is within range again.
        loss = paths(p, leaves, room(257, 5, dtype))[path]()
        small = 2.0**-14 if scale == 2.0**17 else 1.0
        (loss * scale * small).backward()
        grads.append({name: leaf.grad.double() / (scale * small) for name, leaf in leaves.items()})
    for other in grads[1:]:
        for name, value in grads[0].items():
            assert distance(other[name], value) <= torch.finfo(dtype).eps, name


def test_a_loss_scale_beyond_float16(device):
    p = problem(6, dtype=torch.float16, device=device, ignored=0.0)
    leaves = p.leaves()

    def tiny(logprobs, entropy):
        return 2.0**-12 * logprobs.sum()

    loss = gem_kernels.fused_linear_policy_loss(targets=p.targets, token_loss=tiny, **leaves).loss
    (loss * 2.0**16).backward()
    plain = p.leaves()
    stats = gem_kernels.linear_token_stats(targets=p.targets, **plain)
    (16 * stats.logprobs.sum()).backward()
    for name, leaf in leaves.items():
        assert distance(leaf.grad, plain[name].grad) < 0.02, name


@pytest.mark.parametrize("path", LOSSES)
def test_a_second_backward_is_refused(path, device):
    p = problem(12, device=device, ignored=0.0)
    loss = paths(p, p.leaves(), room(257, 5))[path]()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up by its first backward"):
        loss.backward()


@pytest.mark.parametrize("path", LOSSES)
def test_gradients_add_to_those_already_there(path, device):
    p = problem(12, device=device, ignored=0.0)
    leaves = p.leaves()
    run = paths(p, leaves, room(257, 5))[path]
    run().backward()
    once = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    (run() + run()).backward()
    for name, leaf in leaves.items():
        assert_near(leaf.grad, 3 * once[name], 2.0**-21, name)


@pytest.mark.parametrize("path", LOSSES)
@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_ignored_rows_may_hold_nan_in_losses(backend, path, device):
    needs_backend(backend, device)
    p = problem(12, ignored=0.4, device=device)
    results = []
    for filler in (0.0, torch.nan):
        p.hidden[p.targets == IGNORE] = filler
        leaves = p.leaves()
        loss = paths(p, leaves | {"backend": backend}, room(257, 5))[path]()
        results.append(gradients(loss, leaves))
    assert (p.targets == IGNORE).any()
    for name, value in results[0].items():
        assert value.isfinite().all() and torch.equal(value, results[1][name]), name


@pytest.mark.parametrize("path", LOSSES)
def test_all_rows_ignored(path, device):
    p = problem(12, ignored=2.0, device=device)
    leaves = p.leaves()
    workspace_bytes = room(257, 5)
    span = {"cu_seqlens": SPAN["cu_seqlens"].new_tensor([0, 4, 12]).to(device)}
    span |= {"answer_start": torch.tensor([1, 2], device=device), "group_size": 2}
    if path == "policy":
        loss = gem_kernels.fused_linear_policy_loss(targets=p.targets, token_loss=policy, **leaves).loss
    else:
        given = {"advantages": torch.ones(2, device=device)} if "given" in path else {}
        loss = gem_kernels.fused_linear_sega_loss(
            targets=p.targets, **leaves, **span, **given, workspace_bytes=workspace_bytes
        ).loss
    assert all(not value.detach().any() for value in gradients(loss, leaves).values())


@pytest.mark.parametrize("N", [0, 1])
def test_no_row_and_one_row(N, device):
    p = problem(N, ignored=0.0, device=device)
    span = {"answer_start": torch.zeros(N, dtype=torch.int64, device=device), "group_size": 1}
    span["cu_seqlens"] = torch.arange(N + 1, dtype=torch.int32, device=device)
    for given in ({}, {"advantages": torch.ones(N, device=device)}):
        got, out = check_sega(p, span, options=given)
        assert out.path == "one_shot" and out.advantages.shape == (N,)
    assert (N == 0) == (not got["weight"].any())
    leaves = p.leaves()
    loss = gem_kernels.fused_linear_policy_loss(targets=p.targets, token_loss=policy, **leaves).loss
    assert (N == 0) == (not gradients(loss, leaves)["weight"].any())


BAD = {
    "completion_mask": [torch.ones(3, dtype=torch.bool)],
    "cu_seqlens": [None, torch.tensor([0.0, 3.0]), torch.tensor(3), torch.tensor([0, 1, 2]), torch.tensor([0, 4, 3])],
    "answer_start": [None, torch.zeros(2), torch.tensor([0])],
    "group_size": [None, 0, 3, 1.0, True],
    "fork_weight": ["1", None, float("nan")],
    "top_m": [0.0, 1.5, 0, -1, True],
    "no_answer": ["none", None],
    "valid": [torch.ones(2), torch.ones(3, dtype=torch.bool)],
    "mapping": ["linear", None],
    "scale": ["batch", None],
    "eps": [None, "1"],
    "advantages": [torch.ones(3), torch.ones(2, dtype=torch.int64), torch.ones(2).requires_grad_(), [1.0, 2.0]],
    "loss_type": ["median", None],
    "max_completion_length": [0, 1.5],
    "denominator": [-1.0, "1", torch.ones(2), torch.tensor(1.0).requires_grad_()],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD.items() for value in values])
def test_bad_sega_input_names_the_argument(name, value):
    names = {"completion_mask": "(completion_mask|targets)", "cu_seqlens": "(cu_seqlens|completion_mask)"}
    with pytest.raises(ValueError, match=f"^`{names.get(name, name)}` must be .*, got "):
        gem_kernels.fused_linear_sega_loss(**good(), **(SPAN | {name: value}))
