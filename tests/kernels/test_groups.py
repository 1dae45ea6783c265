"""Groups by id, masks of integers, and the answer's start from a marker or from offsets; against the reference."""

from __future__ import annotations

import math

import pytest
import torch

import gem_kernels
from gem_kernels import answer_start, answer_start_from_offsets, group_advantages, reference
from tests.kernels.helpers import assert_near, make

NAN = float("nan")
OPTIONS = [(m, s) for m in ("identity", "softmax", "rank") for s in ("none", "group")]


def shuffled(sizes, seed=0):
    """ids of groups of these sizes, in any order, with numbers that say nothing."""
    ids = torch.tensor([name for name, n in zip((7, -2, 2**40, 0, 5), sizes) for _ in range(n)])
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("mapping,scale", OPTIONS)
def test_groups_of_any_size_in_any_order(mapping, scale, device):
    generator = torch.Generator().manual_seed(1)
    for seed, sizes in enumerate([(4, 1, 7, 2), (3, 3), (1, 1, 1), (9,)]):
        ids = shuffled(sizes, seed)
        scores = torch.randn(len(ids), generator=generator).mul(2).round() + 100
        for valid in (None, torch.rand(len(ids), generator=generator) < 0.6):
            options = {"mapping": mapping, "scale": scale}
            want = reference.group_advantages(scores.double(), group_ids=ids, valid=valid, **options)
            got = group_advantages(
                scores.to(device),
                group_ids=ids.to(device),
                valid=None if valid is None else valid.to(device),
                **options,
            )
            assert_near(got, want.float(), floor=1e-3)
            if valid is not None:
                assert (got.cpu()[~valid] == 0).all()


@pytest.mark.parametrize("mapping,scale", OPTIONS)
def test_equal_scores_give_exact_zeros(mapping, scale, device):
    ids = shuffled((7, 3, 2)).to(device)
    assert not group_advantages(
        torch.full((12,), 0.1, device=device), group_ids=ids, mapping=mapping, scale=scale
    ).any()


@pytest.mark.parametrize("mapping,scale", OPTIONS)
def test_ids_of_runs_are_groups_of_one_size(mapping, scale, device):
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0)).to(device)
    ids = torch.arange(12, dtype=torch.int32, device=device) // 4
    options = {"mapping": mapping, "scale": scale}
    assert_near(group_advantages(scores, group_ids=ids, **options), group_advantages(scores, 4, **options), floor=1e-3)


@pytest.mark.parametrize("mapping", ["identity", "softmax"])
def test_nan_stays_in_its_group(mapping, device):
    scores = torch.tensor([1.0, 4.0, NAN, 2.0, NAN], device=device)
    ids = torch.tensor([3, 1, 3, 1, 1], device=device)
    valid = torch.tensor([1, 1, 1, 1, 0], device=device)
    got = group_advantages(scores, group_ids=ids, valid=valid, mapping=mapping).tolist()
    assert math.isnan(got[0]) and math.isnan(got[2]) and got[4] == 0.0
    assert got[1] == -got[3] != 0.0


def test_no_sequences(device):
    ids = torch.zeros(0, dtype=torch.int64, device=device)
    assert group_advantages(torch.zeros(0, device=device), group_ids=ids).shape == (0,)


def batch(device, packed):
    """Three prompts, 2 + 3 + 1 candidates in any order; random masks."""
    logits, targets = make(6, 9, 31, device=device)
    lengths = torch.tensor([9, 7, 5, 8, 2, 6])
    mask = torch.arange(9) < lengths[:, None]
    layout = {"answer_start": torch.tensor([6, 4, 2, 5, 1, 9]).to(device)}
    if packed:
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device)
        return logits[mask.to(device)], targets[mask.to(device)], layout | {"cu_seqlens": offsets}
    return logits, targets, layout | {"completion_mask": mask.to(device)}


IDS = torch.tensor([4, 9, 9, 4, 1, 9])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_every_function_takes_group_ids(packed, device):
    logits, targets, layout = batch(device, packed)
    ids = IDS.to(device)
    want = reference.sega_loss(logits.double(), targets, group_ids=ids, **layout)
    hidden, weight = logits, torch.eye(31, device=device)
    assert want.advantages[4] == 0 and (want.advantages[:4] != 0).all()
    for loss in (
        gem_kernels.fused_entropy_score(logits, targets, group_ids=ids, **layout),
        gem_kernels.fused_linear_entropy_score(hidden, weight, targets, group_ids=ids, **layout),
        gem_kernels.sega_loss(logits, targets, group_ids=ids, **layout),
        gem_kernels.fused_linear_sega_loss(hidden, weight, targets, group_ids=ids, **layout),
    ):
        assert_near(loss.advantages, want.advantages.float(), 2.0**-14)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("workspace", [1 << 20, 31 * 4 * 10], ids=["one_shot", "two_phase"])
def test_gradients_of_groups_in_any_order(workspace, packed, device):
    hidden, targets, layout = batch(device, packed)
    weight = torch.randn(31, 31, generator=torch.Generator().manual_seed(2)).to(device) / 5
    ids, leaves = IDS.to(device), [hidden.requires_grad_(), weight.requires_grad_()]
    want = reference.sega_loss(hidden.double() @ weight.double().T, targets, group_ids=ids, **layout)
    out = gem_kernels.fused_linear_sega_loss(
        hidden, weight, targets, group_ids=ids, workspace_bytes=workspace, **layout
    )
    assert out.path == ("one_shot" if workspace == 1 << 20 else "two_phase")
    for got, expected in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(want.loss, leaves)):
        assert_near(got, expected, 2.0**-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_mask_of_integers_is_the_mask_of_booleans(dtype, device):
    logits, targets, layout = batch(device, packed=False)
    valid = torch.tensor([1, 1, 1, 0, 1, 1], device=device)
    linear = {"hidden": logits, "weight": torch.eye(31, device=device), "targets": targets, "group_size": 2}
    calls = {
        gem_kernels.entropy_scores: {"entropy": logits[..., 0].abs()},
        gem_kernels.completion_features: {"entropy": logits[..., 0].abs(), "logprobs": -logits[..., 1].abs()},
        gem_kernels.fused_entropy_score: {"logits": logits, "targets": targets, "group_size": 2},
        gem_kernels.sega_loss: {"logits": logits, "targets": targets, "group_size": 2},
        gem_kernels.fused_linear_entropy_score: linear,
        gem_kernels.fused_linear_sega_loss: linear,
    }
    for function, given in calls.items():
        want = function(**given, **layout, valid=valid.bool())
        integers = {**layout, "completion_mask": layout["completion_mask"].to(dtype)}
        got = function(**given, **integers, valid=valid.to(dtype))
        for name, value in vars(want).items():
            assert value is None or isinstance(value, str) or torch.equal(getattr(got, name), value), (function, name)
    scores = torch.randn(6, device=device)
    want, got = (group_advantages(scores, 3, valid=v) for v in (valid.bool(), valid.to(dtype)))
    assert torch.equal(got, want)


# Where the answer begins.

MARK = [5, 6]
# completion (None: not counted), answer_start
STARTS = {
    "once": ([1, 5, 6, 2, 3], 3),
    "the last one counts": ([5, 6, 2, 5, 6, 3, 1], 5),
    "none": ([1, 5, 2, 6], -1),
    "at the very end": ([1, 2, 5, 6], 4),
    "alone": ([5, 6], 2),
    "broken by a tool's output": ([5, None, 6, 1], -1),
    "after a prompt": ([None, None, 1, 5, 6, 4], 3),
    "in the prompt": ([5, 6, 1, 2], -1),
    "empty": ([None, None], -1),
}
PROMPTS = {"in the prompt": 2}


def padded(rows, device):
    """Rows of words and None -> ids [B, T], mask; an uncounted place holds part of a marker."""
    T = max(map(len, rows))
    rows = [row + [None] * (T - len(row)) for row in rows]
    ids = torch.tensor([[5 if w is None else w for w in row] for row in rows], device=device)
    return ids, torch.tensor([[w is not None for w in row] for row in rows], device=device)


def test_starts_by_hand(device):
    ids, mask = padded([row for row, _ in STARTS.values()], device)
    for i, name in enumerate(STARTS):
        mask[i, : PROMPTS.get(name, 0)] = False
    want = [start for _, start in STARTS.values()]
    assert answer_start(ids, MARK, completion_mask=mask).tolist() == want
    assert answer_start(ids, torch.tensor(MARK), completion_mask=mask.long()).tolist() == want
    assert reference.answer_start(ids, [MARK], completion_mask=mask).tolist() == want


def test_a_marker_does_not_cross_two_completions(device):
    ids = torch.tensor([1, 5, 6, 2, 5, 6], device=device)
    for bounds, want in (((0, 2, 6), [-1, 4]), ((0, 3, 3, 6), [3, -1, 3]), ((0, 6), [6])):
        offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
        assert answer_start(ids, MARK, cu_seqlens=offsets).tolist() == want


@pytest.mark.parametrize("markers", [[[5]], [[5, 6]], [[5, 6], [6, 5, 5], [7]]], ids=str)
def test_any_completions(markers, device):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 8, (40, 12), generator=generator)
    holes = torch.rand(40, 12, generator=generator) < 0.85
    lengths = torch.randint(0, 13, (40,), generator=generator)
    packed = torch.arange(12) < lengths[:, None]
    want = reference.answer_start(ids, markers, completion_mask=holes)
    assert len(set(want.tolist())) > 3
    assert torch.equal(answer_start(ids.to(device), markers, completion_mask=holes.to(device)).cpu(), want)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device)
    want = reference.answer_start(ids[packed], markers, cu_seqlens=offsets.cpu())
    assert torch.equal(want, reference.answer_start(ids, markers, completion_mask=packed))
    assert torch.equal(answer_start(ids[packed].int().to(device), markers, cu_seqlens=offsets).cpu(), want)


def test_a_marker_longer_than_all_tokens(device):
    ids = torch.ones(2, 3, dtype=torch.int64, device=device)
    assert answer_start(ids, [1] * 7, completion_mask=ids).tolist() == [-1, -1]
    assert answer_start(ids[:, :0], [1], completion_mask=ids[:, :0]).tolist() == [-1, -1]
    assert answer_start(ids[:0, 0], [1], cu_seqlens=torch.zeros(1, dtype=torch.int32, device=device)).tolist() == []


def test_starts_from_offsets(device):
    # "x = 12." in tokens "x", " =", " 12", "."; characters 0-1, 1-3, 3-6, 6-7
    spans = torch.tensor([[0, 1], [1, 3], [3, 6], [6, 7]], device=device)
    chars = torch.tensor([4, 3, 0, 6, 7, -1], device=device)
    want = [2, 2, 0, 3, -1, -1]
    mask = torch.ones(6, 4, dtype=torch.bool, device=device)
    assert answer_start_from_offsets(spans.repeat(6, 1, 1), chars, completion_mask=mask).tolist() == want
    offsets = torch.arange(7, dtype=torch.int32, device=device) * 4
    assert answer_start_from_offsets(spans.repeat(6, 1), chars, cu_seqlens=offsets).tolist() == want
    # A prompt of two tokens before it, and a hole: positions count from the completion's first token.
    mask[:, 0], mask[:, 2] = False, False
    assert answer_start_from_offsets(spans.repeat(6, 1, 1), chars, completion_mask=mask).tolist() == [
        2,
        2,
        0,
        2,
        -1,
        -1,
    ]


def test_the_start_is_that_of_the_scores(device):
    """The tokens after the marker are the answer span."""
    ids = torch.tensor([[1, 2, 5, 6, 3, 4]], device=device)
    entropy = torch.tensor([[9.0, 8.0, 7.0, 6.0, 1.0, 2.0]], device=device)
    start = answer_start(ids, MARK, completion_mask=ids > 0)
    assert float(gem_kernels.entropy_scores(entropy, completion_mask=ids > 0, answer_start=start).final_entropy) == 1.5
