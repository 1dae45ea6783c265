"""A cache with room holds what transformers' own holds, whatever happens to it, and is written in place."""

import pytest
import torch
from transformers import DynamicCache, Gemma2Config
from transformers.cache_utils import DynamicLayer

from gem.rollout.cache import ROOM, RoomyLayer, sampling_cache
from tests.helpers import tiny_model

B, HEADS, D = 3, 2, 4
MODEL = tiny_model()


def tokens(n: int, rows: int = B) -> list[torch.Tensor]:
    return list(torch.randn(2, rows, HEADS, n, D))


def both(steps) -> list[DynamicLayer]:
    """transformers' layer and ours after the same steps: (name of a method, arguments)."""
    layers = [DynamicLayer(), RoomyLayer()]
    for name, arguments in steps:
        returned = [getattr(layer, name)(*arguments) for layer in layers]
        if name == "update":
            for theirs, ours in zip(*returned):
                assert torch.equal(theirs, ours)
    return layers


UPDATES = [("update", tokens(1)) for _ in range(3)]
KEEP = torch.tensor([0, 2])
STORIES = {
    "a prompt and tokens": [("update", tokens(5)), *UPDATES],
    "candidates of each prompt": [
        ("update", tokens(5)), ("batch_repeat_interleave", [2]), *[("update", tokens(1, 2 * B))] * 3,
    ],
    "candidates after tokens": [
        ("update", tokens(5)), *UPDATES, ("batch_repeat_interleave", [2]), *[("update", tokens(1, 2 * B))] * 3,
    ],
    "more tokens than there is room": [("update", tokens(2)), *[("update", tokens(1))] * (2 * ROOM + 3)],
    "several tokens at once": [("update", tokens(2)), ("update", tokens(ROOM)), ("update", tokens(7)), *UPDATES],
    "rows that end": [
        ("update", tokens(5)), *UPDATES, ("batch_select_indices", [KEEP]), ("update", tokens(1, 2)),
        ("batch_select_indices", [torch.tensor([1])]), ("update", tokens(1, 1)),
    ],
    "rows that end at once": [("update", tokens(5)), ("batch_select_indices", [KEEP]), ("update", tokens(1, 2))],
    "beams": [("update", tokens(5)), *UPDATES, ("reorder_cache", [torch.tensor([2, 0, 0])]), *UPDATES],
    "tokens taken back": [("update", tokens(5)), *UPDATES, ("crop", [-2]), *UPDATES],
    "begun anew": [("update", tokens(5)), *UPDATES, ("reset", []), ("update", tokens(4)), *UPDATES],
}  # fmt: skip


@pytest.mark.parametrize("name", STORIES)
@torch.no_grad()
def test_what_it_holds(name, poisoned_empty):
    theirs, ours = both(STORIES[name])
    assert theirs.get_seq_length() == ours.get_seq_length()
    assert torch.equal(theirs.keys, ours.keys) and torch.equal(theirs.values, ours.values)


@torch.no_grad()
def test_a_token_is_written_in_place():
    layer = RoomyLayer()
    places = [layer.update(*tokens(n))[0].data_ptr() for n in (5, *[1] * (ROOM + 1))]
    assert len(set(places[1:])) == 1
    layer.batch_select_indices(KEEP)
    assert layer.update(*tokens(1, 2))[0].data_ptr() != places[0] and layer.keys.shape == (2, HEADS, 5 + ROOM + 2, D)


@torch.no_grad()
def test_a_model_computes_with_it_what_it_computes_with_its_own():
    ids, logits = torch.randint(9, 30, (2, 12)), []
    for cache in (DynamicCache(config=MODEL.config), sampling_cache(MODEL.config)):
        rows = [MODEL(ids[:, :4], past_key_values=cache).logits[:, -1]]
        rows += [MODEL(ids[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(4, 12)]
        logits.append(torch.stack(rows))
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5 * float(logits[0].abs().max()))


def test_layers_with_a_window_are_the_models_own():
    config = Gemma2Config(num_hidden_layers=4, sliding_window=8)
    kinds = [type(layer) for layer in DynamicCache(config=config).layers]
    found = [type(layer) for layer in sampling_cache(config).layers]
    assert DynamicLayer in kinds and any(kind is not DynamicLayer for kind in kinds)
    assert found == [RoomyLayer if kind is DynamicLayer else kind for kind in kinds]
