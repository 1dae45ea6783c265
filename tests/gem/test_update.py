"""Optimizer steps: micro-batches never change a gradient; hand-made scores; what is masked is not trained on."""

import dataclasses
import math

import pytest
import torch

from gem.config.settings import Scoring, SegaUpdate
from gem.data.batches import TokenizedPair, collate
from gem.model.forward import Policy, completion_stats
from gem.rollout.sample import given_completions
from gem.scoring.score import score_rollout
from gem.update.optimizer import NO_STEP
from gem.update.sega import sega_denominator, sega_step
from gem.update.sft import sft_step
from gem_kernels import EntropyScores
from tests.helpers import END, FORM, Recorder, encode, rollout_of, tiny_model, trainer_of
from tests.kernels.helpers import assert_near


@pytest.mark.parametrize("loss_type", ["sum", "mean", "token", "constant"])
def test_sega_gradient_is_the_same_for_every_micro_batch(loss_type):
    model = tiny_model()
    scored = score_rollout(Policy(model), rollout_of(num_prompts=8), Scoring(), batch_size=3)
    results, gradients = [], []
    for micro_batch_size in (8, 2, 1):
        trainer = Recorder(model, micro_batch_size=micro_batch_size)
        update = SegaUpdate(loss_type=loss_type, max_completion_length=64)
        results.append(sega_step(trainer, scored, update))
        gradients.append(trainer.gradient)
    assert gradients[0].norm() > 0
    for result, gradient in zip(results[1:], gradients[1:]):
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6 * float(gradients[0].abs().max()))
        assert result.loss == pytest.approx(results[0].loss, rel=1e-4, abs=1e-6)
        assert result.num_sequences == 16


def test_denominators_by_hand():
    """Three sequences of 2, 5 and 3 tokens, the second invalid, of at most 8 tokens each."""
    valid, lengths = torch.tensor([True, False, True]), torch.tensor([2, 5, 3])
    for loss_type, value in {"sum": 2, "mean": 2, "token": 5, "constant": 16}.items():
        assert sega_denominator(valid, lengths, SegaUpdate(loss_type=loss_type, max_completion_length=8)) == value


def test_sft_gradient_is_the_same_for_every_micro_batch_and_is_a_mean_over_tokens():
    model = tiny_model()
    pairs = [TokenizedPair(encode("q" * i), (*encode("a b" * i), END), (END,), None) for i in range(1, 9)]
    losses, gradients = [], []
    for micro_batch_size in (8, 2, 1):
        trainer = Recorder(model, micro_batch_size=micro_batch_size)
        result = sft_step(trainer, pairs, pad_id=0)
        losses.append(result.loss)
        gradients.append(trainer.gradient)
    assert_near(gradients[1], gradients[0], 1e-5)
    assert_near(gradients[2], gradients[0], 1e-5)
    total, count = 0.0, 0
    with torch.no_grad():
        for pair in pairs:
            ids = torch.tensor([pair.prompt_ids + pair.chosen_ids])
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            total -= float(logprobs[len(pair.prompt_ids) - 1 :].sum())  # prompt masked
            count += len(pair.chosen_ids)
    assert losses == pytest.approx([total / count] * 3, rel=1e-4)


def test_the_one_shot_sft_loss_is_that_of_the_log_probs():
    """Three head products instead of the four of differentiable log-probs: the same loss and gradient, to rounding."""
    model = tiny_model()
    pairs = [TokenizedPair(encode("q" * i), (*encode("a b" * i), END), (END,), None) for i in range(1, 6)]
    trainer = Recorder(model, micro_batch_size=2)
    result = sft_step(trainer, pairs, pad_id=0)
    num_tokens = sum(len(pair.sft_ids) for pair in pairs)
    batch = collate([p.prompt_ids for p in pairs], [p.sft_ids for p in pairs], 0)
    loss = -completion_stats(Policy(model), batch).logprobs.sum() / num_tokens
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert result.num_tokens == num_tokens and result.loss == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(trainer.gradient, gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_sft_makes_its_gradients_in_the_forward(monkeypatch):
    """The logits are made once: no statistics that a backward would have to make them again for."""
    monkeypatch.setattr("gem.model.forward.linear_token_stats", None)  # calling it now fails
    pairs = [TokenizedPair(encode("q"), (*encode("a"), END), (END,), None)]
    assert sft_step(Recorder(tiny_model()), pairs, pad_id=0).grad_norm > 0


def test_sega_step_raises_the_better_candidate_and_lowers_the_worse():
    model = tiny_model()
    scored = score_rollout(Policy(model), rollout_of(num_prompts=1), Scoring(), batch_size=1)
    trainer = trainer_of(model, learning_rate=1e-3, total_steps=3)
    sega_step(trainer, scored, SegaUpdate(max_completion_length=64))
    after = score_rollout(Policy(model), scored.rollout, Scoring(), batch_size=1)
    change = (after.logprobs - scored.logprobs).sum(1)
    better = int(scored.advantages.argmax())
    assert float(scored.advantages[better]) > 0
    assert float(change[better] - change[1 - better]) > 0


def test_scores_by_hand():
    """Means over the answer span, end token included, and the top tenth of the tokens before it."""
    model = tiny_model()
    rollout = rollout_of(num_prompts=1)
    scored = score_rollout(Policy(model), rollout, Scoring(fork_weight=0.5), batch_size=1)
    for i in range(2):
        n, start = int(rollout.batch.lengths[i]), int(rollout.spans.answer_start[i])
        entropy = scored.entropy[i, :n]
        top = max(1, math.floor(start / 10))
        final, fork = entropy[start:].mean(), entropy[:start].topk(top).values.mean()
        torch.testing.assert_close(scored.scores.score[i], -final + 0.5 * fork, rtol=1e-5, atol=1e-5)
    assert float(scored.advantages.sum()) == pytest.approx(0, abs=1e-6)


def test_equal_scores_take_no_step():
    model = tiny_model()
    prompts, row = [encode("q")], (*encode("Final Answer: 1"), END)
    rollout = given_completions(FORM, prompts, [row, row])
    scored = score_rollout(Policy(model), rollout, Scoring(), batch_size=1)
    before = [p.clone() for p in model.parameters()]
    trainer = trainer_of(model, learning_rate=1.0, total_steps=4, lr_schedule="linear")
    assert sega_step(trainer, scored, SegaUpdate()) is NO_STEP
    assert trainer.learning_rate == 0.75 and trainer.bad_steps == 0  # the step counts, and is no fault
    sega_step(trainer, scored, SegaUpdate(num_iterations=2))
    assert trainer.learning_rate == 0.25
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_groups_without_advantages_are_skipped_but_counted():
    """Three groups of equal scores beside one of different scores: a quarter of its gradient alone."""
    model = tiny_model()
    scored = score_rollout(Policy(model), rollout_of(num_prompts=4), Scoring(), batch_size=4)
    advantages = scored.advantages.clone()
    advantages[2:] = 0
    trainer = Recorder(model)
    update = SegaUpdate(max_completion_length=64)
    result = sega_step(trainer, dataclasses.replace(scored, advantages=advantages), update)
    whole = trainer.gradient
    assert result.num_sequences == 2
    alone = score_rollout(Policy(model), rollout_of(num_prompts=1), Scoring(), batch_size=1)
    sega_step(trainer, alone, update)
    # The advantages are differences of two scores, made in batches of four prompts and of one: what rounding leaves of
    # them is a larger share of the difference than of the scores.
    assert_near(whole, trainer.gradient / 4, 2.0**-13)


def test_truncated_candidates_can_be_left_out():
    model = tiny_model()
    rows = [(*encode("Final Answer: 1"), END), encode("still going"), (*encode("Final Answer: 20"), END)]
    rollout = given_completions(FORM, [encode("q")], rows)
    scored = score_rollout(Policy(model), rollout, Scoring(mask_truncated=True), batch_size=1)
    assert scored.scores.valid.tolist() == [True, False, True]
    assert float(scored.advantages[1]) == 0 and float(scored.advantages.sum()) == pytest.approx(0, abs=1e-6)
    assert isinstance(scored.scores, EntropyScores)
    assert score_rollout(Policy(model), rollout, Scoring(), batch_size=1).scores.valid.all()


def test_learning_rate_warms_up_and_falls():
    model = tiny_model()

    def rates(**arguments):
        trainer = trainer_of(model, learning_rate=1.0, total_steps=6, **arguments)
        seen = []
        for _ in range(6):
            seen.append(trainer.learning_rate)
            trainer.step()
        return seen

    assert rates() == [1.0] * 6
    assert rates(warmup_steps=2) == [0.5, 1, 1, 1, 1, 1]
    assert rates(warmup_steps=2, lr_schedule="linear") == [0.5, 1, 1, 0.75, 0.5, 0.25]
    half = math.sqrt(0.5)
    by_hand = [0.5, 1, 1, (1 + half) / 2, 0.5, (1 - half) / 2]
    assert rates(warmup_steps=2, lr_schedule="cosine") == pytest.approx(by_hand, rel=1e-12)


def test_the_gradient_is_clipped_and_its_norm_reported():
    model = tiny_model()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    size = sum(p.numel() for p in model.parameters())
    trainer = trainer_of(model, learning_rate=1.0, total_steps=1, max_grad_norm=0.5)
    seen = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()))
    )
    assert trainer.step().grad_norm == pytest.approx(math.sqrt(size), rel=1e-4)
    assert seen == [pytest.approx(0.5, rel=1e-3)]
    assert all(p.grad is None for p in model.parameters())
