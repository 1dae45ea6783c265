"""Rollouts and the forward pass: what padding, sharing a prompt, and leaving the batch early must never change."""

import dataclasses

import numpy as np
import pytest
import torch

from gem.config.settings import Sampling
from gem.data.batches import collate, pad_rows
from gem.model import forward
from gem.model.forward import Policy, completion_hidden, completion_stats
from gem.rollout.sample import given_completions, pick_tokens, roll_out, row_keys, sample_tokens, uniforms
from tests.helpers import FORM, tiny_model, tiny_tokenizer
from tests.kernels.helpers import assert_near

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id
MODEL = tiny_model()
PROMPTS = [TOKENIZER.encode(text) for text in ("a", "What is 2 + 2?", "Count to three, slowly.")]
COMPLETIONS = [TOKENIZER.encode(text) for text in ("one", "fifteen!", "4", "it is four", "1, 2, 3", "no")]


def alone(prompt, completion):
    """Log-probs [n, V] of one completion, with no batch, no padding and no cache."""
    ids = torch.tensor([prompt + completion])
    return MODEL(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_gives_what_each_sequence_gives_alone(shared, monkeypatch):
    if not shared:
        monkeypatch.setattr(forward, "can_share_prompt", lambda model: False)
    batch = collate(PROMPTS, COMPLETIONS, TOKENIZER.pad_token_id)
    with torch.no_grad():
        stats = completion_stats(Policy(MODEL), batch)
        for i, completion in enumerate(COMPLETIONS):
            truth = alone(PROMPTS[i // 2], completion)
            n = len(completion)
            assert_near(stats.logprobs[i, :n], truth[torch.arange(n), torch.tensor(completion)])
            entropy = -(truth.exp() * truth).sum(-1)
            assert_near(stats.entropy[i, :n], entropy)
            assert not stats.logprobs[i, n:].any() and not stats.entropy[i, n:].any()


def test_the_value_under_the_padding_never_matters():
    batches = [collate(PROMPTS, COMPLETIONS, pad) for pad in (0, END)]
    with torch.no_grad():
        stats = [completion_stats(Policy(MODEL), batch) for batch in batches]
    assert torch.equal(stats[0].logprobs, stats[1].logprobs) and torch.equal(stats[0].entropy, stats[1].entropy)


def test_sharing_the_prompt_keeps_the_gradient(monkeypatch):
    batch = collate(PROMPTS, COMPLETIONS, TOKENIZER.pad_token_id)
    calls = []
    monkeypatch.setattr(forward, "prompt_cache", lambda *a, real=forward.prompt_cache: calls.append(1) or real(*a))
    gradients = []
    for share in (True, False):
        monkeypatch.setattr(forward, "can_share_prompt", lambda model, share=share: share)
        model = tiny_model()
        hidden = completion_hidden(Policy(model), batch)[0]
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
        (hidden * weights)[batch.completion_mask].sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert len(calls) == 1
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def test_gradient_checkpointing_in_training_does_not_share():
    model = tiny_model()
    assert forward.can_share_prompt(model)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    assert forward.can_share_prompt(model)  # it matters in training only
    model.train()
    assert not forward.can_share_prompt(model)


def sample(prompts, sampling, ends):
    keys = row_keys(0, 0, range(len(prompts)), sampling.num_generations)
    return [row.ids for row in sample_tokens(MODEL, *pad_rows(prompts, 0, left=True), sampling, ends, keys)]


def test_greedy_is_the_argmax_of_each_sequence_alone():
    sampling = Sampling(num_generations=1, max_completion_length=12, temperature=0.0)
    rows = sample(PROMPTS, sampling, [END])
    with torch.no_grad():
        for prompt, row in zip(PROMPTS, rows):
            ids = list(prompt)
            for token in row:
                assert token == MODEL(torch.tensor([ids])).logits[0, -1].argmax().item()
                ids.append(token)
            assert len(row) == 12 or row[-1] == END


def test_rows_that_end_early_leave_the_others_as_they_were():
    """Greedy rows with many end tokens (so that rows leave the batch) are prefixes of the rows with none."""
    sampling = Sampling(num_generations=2, max_completion_length=24, temperature=0.0)
    prompts = [TOKENIZER.encode(text) for text in ("b", "hello", "xyz 12", "what", "Q", "7 * 6 =")]
    whole = sample(prompts, sampling, [])
    tokens = sorted({t for row in whole for t in row})
    ends = tokens[::3]
    cut = sample(prompts, sampling, ends)
    lengths = set()
    for long, short in zip(whole, cut):
        first = next((i for i, t in enumerate(long) if t in ends), len(long) - 1)
        assert short == long[: first + 1]
        lengths.add(len(short))
    assert len(lengths) > 1 and min(lengths) < 24


def roll(prompts, seed, num_generations=4, ends=(END,), batch_size=2, step=0, stats_temperature=None, **more):
    sampling = Sampling(num_generations=num_generations, max_completion_length=16, **more)
    form = dataclasses.replace(FORM, end_tokens=ends)
    return roll_out(
        Policy(MODEL), form, prompts, sampling, seed=seed, batch_size=batch_size, step=step,
        stats_temperature=stats_temperature,
    )  # fmt: skip


def test_a_rollout_is_cut_at_the_first_of_all_end_tokens():
    ends = tuple(range(0, 272, 12))
    rollout = roll(PROMPTS, seed=1, num_generations=8, ends=ends)
    batch = rollout.batch
    assert batch.completion_ids.shape[0] == 24 and len(rollout.texts) == 24
    found = 0
    for ids, mask, truncated in zip(batch.completion_ids.tolist(), batch.completion_mask, rollout.truncated.tolist()):
        n = int(mask.sum())
        assert mask.tolist() == [True] * n + [False] * (len(ids) - n)
        assert not any(t in ends for t in ids[: n - 1])
        assert truncated == (ids[n - 1] not in ends)
        assert not truncated or n == 16
        found += not truncated
    assert found > 0


def test_the_seed_decides_the_rollout():
    one, two, other = roll(PROMPTS, 5), roll(PROMPTS, 5), roll(PROMPTS, 6)
    assert torch.equal(one.batch.completion_ids, two.batch.completion_ids)
    assert one.texts != other.texts
    assert len(set(one.texts[:4])) > 1  # candidates of one prompt differ


def test_a_candidate_does_not_depend_on_its_batch():
    prompts = [TOKENIZER.encode(text) for text in ("b", "hello there", "xyz 12", "what", "Q")]
    more = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.2}
    whole, single = roll(prompts, 3, batch_size=5, **more), roll(prompts, 3, batch_size=1, **more)
    assert whole.texts == single.texts
    assert roll(prompts, 3, step=1, **more).texts != whole.texts
    twice = roll([prompts[0]] * 2, 3, **more)
    assert twice.texts[:4] == whole.texts[:4] and twice.texts[4:] != whole.texts[:4]


def test_recorded_statistics_are_those_of_a_forward():
    rollout = roll(PROMPTS, 2, ends=tuple(range(0, 272, 12)), stats_temperature=0.7, temperature=1.3, top_k=50)
    with torch.no_grad():
        stats = completion_stats(Policy(MODEL), rollout.batch, temperature=0.7)
    assert len(set(rollout.batch.lengths.tolist())) > 1
    assert_near(rollout.logprobs, stats.logprobs)
    assert_near(rollout.entropy, stats.entropy)
    assert roll(PROMPTS, 2).entropy is None


def test_draws_are_uniform_and_independent():
    """SplitMix64 from key 0 begins with 0xE220A8397B1DCDAF (its published first output); moments of many rows."""
    assert float(uniforms(np.zeros(1, dtype=np.uint64), 1)) == (0xE220A8397B1DCDAF >> 11) * 2.0**-53
    values = uniforms(row_keys(0, 0, range(100), 4), 50)
    assert len(set(values.flatten().tolist())) == values.numel()
    assert float(values.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(values.var()) == pytest.approx(1 / 12, abs=3e-3)
    assert abs(float(torch.corrcoef(values[:2])[0, 1])) < 0.5 and float(values.max()) < 1


def shares(probs, seen=None, **sampling):
    logits = torch.tensor([probs]).log().expand(4000, -1)
    draws = uniforms(row_keys(0, 0, range(1000), 4), 1)[:, 0]
    tokens = pick_tokens(logits, Sampling(num_generations=1, max_completion_length=1, **sampling), draws, seen)
    return (torch.bincount(tokens, minlength=logits.shape[1]) / 4000).tolist()


def test_filters_by_hand():
    probs = [0.5, 0.25, 0.15, 0.1]
    assert shares(probs) == pytest.approx(probs, abs=0.03)
    assert shares(probs, top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.03)
    assert shares(probs, top_p=0.8) == pytest.approx([5 / 9, 5 / 18, 1 / 6, 0], abs=0.03)
    assert shares(probs, top_p=0.49) == [1, 0, 0, 0]
    assert shares(probs, min_p=0.25) == pytest.approx([5 / 9, 5 / 18, 1 / 6, 0], abs=0.03)
    sharp = [p**2 for p in probs]
    assert shares(probs, temperature=0.5) == pytest.approx([p / sum(sharp) for p in sharp], abs=0.03)
    assert shares(probs, temperature=0.0) == [1, 0, 0, 0]
    # A log-prob of a token seen before is doubled: 0.5 becomes 0.25.
    penalized = [p / 0.75 for p in (0.25, 0.25, 0.15, 0.1)]
    seen = torch.zeros(4000, 3, dtype=torch.int64)
    assert shares(probs, seen, repetition_penalty=2.0) == pytest.approx(penalized, abs=0.03)


def test_the_ends_of_the_draw():
    """A draw of 0 is the first token that is possible, the last before 1 the last one."""
    logits = torch.tensor([[0.0, 0.3, 0.7, 0.0]]).log().expand(2, -1)
    draws = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert pick_tokens(logits, Sampling(num_generations=1, max_completion_length=1), draws).tolist() == [1, 2]


def test_given_completions_have_the_form_of_a_rollout():
    rows = [[*TOKENIZER.encode("Final Answer: 4"), END], TOKENIZER.encode("Final Answer: 5")]
    rollout = given_completions(FORM, PROMPTS[:1], rows)
    assert rollout.truncated.tolist() == [False, True]
    assert rollout.texts == ("Final Answer: 4", "Final Answer: 5")
    assert rollout.batch.num_generations == 2 and rollout.spans.answers == ("4", "5")
