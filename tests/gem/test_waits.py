"""No micro-batch of a step waits for the device: model and head on meta tensors, batches on the host.

A step's end does: the loss, the gradient's norm and the sums for the metrics are read there, once. And transformers
itself looks at the attention mask (sdpa attention) and at packed positions, once a forward; here it is kept from both.
"""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils

from bench.counts import META, Counter, standing_in
from gem.config.settings import DpoUpdate, Scoring, SegaUpdate
from gem.data.batches import TokenizedPair
from gem.model.forward import Policy, completion_stats
from gem.scoring.score import score_rollout
from gem.update.dpo import dpo_step
from gem.update.sega import sega_step
from gem.update.sft import sft_step
from gem_kernels.integrations import transformers as integration
from tests.helpers import END, encode, rollout_of, tiny_model, trainer_of

SIZES = (1, 272, 32)  # rows are not counted here


class Ended(Exception):
    """The step's end, where it may wait."""


@pytest.fixture
def on_meta(monkeypatch):
    """A policy on the stand-in, whose head counts as checked. One micro-batch a prompt."""
    monkeypatch.setattr(integration, "_verify_once", lambda parts: None)
    monkeypatch.setattr(integration, "_linear", lambda module: module)  # it refuses weights that are not there
    model = tiny_model().to(META)
    model.set_attn_implementation("eager")
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    trainer = trainer_of(model, micro_batch_size=1)

    def end():
        raise Ended

    monkeypatch.setattr(trainer, "step", end)
    return trainer


def scored():
    return score_rollout(Policy(tiny_model()), rollout_of(num_prompts=3), Scoring(), batch_size=3)


def pairs():
    return [TokenizedPair(encode("q" * i), (*encode("a b" * i), END), (END,), None) for i in range(1, 4)]


CLIPPED = SegaUpdate(epsilon=0.2, beta=0.1, num_iterations=2)
STEPS = {
    "sega": lambda trainer, rollout: sega_step(trainer, rollout, SegaUpdate()),
    "sega, clipped, with KL": lambda trainer, rollout: sega_step(
        trainer, rollout, CLIPPED, ref_logprobs=rollout.logprobs
    ),
    "sft": lambda trainer, rollout: sft_step(trainer, pairs(), pad_id=0),
    "dpo": lambda trainer, rollout: dpo_step(trainer, pairs(), torch.zeros(3, 2), DpoUpdate(), pad_id=0),
}


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("step", STEPS)
def test_no_micro_batch_waits(step, padding_free, on_meta):
    rollout = scored()
    on_meta.policy = Policy(on_meta.model, padding_free)
    counter = Counter(*SIZES, strict=True)
    with standing_in(), counter, pytest.raises(Ended):
        STEPS[step](on_meta, rollout)
    assert on_meta.model.model.embed_tokens.weight.grad is not None and counter.launches > 100


def test_padding_is_not_multiplied(on_meta):
    """Of the head's products: as many rows as there are completion tokens."""
    batch = rollout_of(num_prompts=3).batch
    tokens = int(batch.lengths.sum())
    counter = Counter(tokens, *SIZES[1:], strict=True)
    with torch.no_grad(), standing_in(), counter:
        completion_stats(on_meta.policy, batch)
    assert batch.completion_mask.numel() > tokens
    head = [shape for _, shape in counter.made if shape[-1:] == (272,)]
    assert max(head) == (tokens, 272)  # the others: each prompt's last token
