"""SEGA with clipping and KL, and DPO, against float64 autograd through whole logits, and by hand."""

import dataclasses
import math

import pytest
import torch

from gem.config.settings import DpoUpdate, Lora, Scoring, SegaUpdate
from gem.data.batches import TokenizedPair
from gem.model.forward import Policy, completion_stats, measured_stats, pair_logprobs
from gem.model.lora import add_lora
from gem.model.starting_policy import StartingPolicy
from gem.rollout.sample import given_completions
from gem.scoring.score import score_rollout
from gem.update.dpo import dpo_step, filtered_pairs
from gem.update.optimizer import NO_STEP
from gem.update.sega import clip_range, clipped_loss, k3, mean_kl, sega_step
from tests.helpers import END, FORM, Recorder, encode, rollout_of, tiny_model, trainer_of
from tests.kernels.helpers import assert_near


def tokens_of(batch, row):
    prompt = row // batch.num_generations
    return (
        batch.prompt_ids[prompt][batch.prompt_mask[prompt]],
        batch.completion_ids[row][batch.completion_mask[row]],
    )


def true_logprobs(model, prompt, completion, temperature=1.0):
    """Log-probs of the completion's tokens through the whole logits, in the model's dtype."""
    ids = torch.cat([prompt, completion])
    logits = model(ids[None]).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]


def double_model():
    return tiny_model().double()


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def scored_rollout(**arguments):
    return score_rollout(Policy(tiny_model()), rollout_of(num_prompts=4, size=3), Scoring(**arguments), batch_size=4)


def off_policy(scored, seed=3):
    """Log-probs of other policies: the sampler's, so that ratios leave the clip range at both ends, and the start's."""
    torch.manual_seed(seed)
    mask = scored.rollout.batch.completion_mask
    old = scored.logprobs + 0.4 * torch.randn(mask.shape) * mask
    return dataclasses.replace(scored, logprobs=old), (old + 0.3 * torch.randn(mask.shape)) * mask


def true_sega(model, scored, ref, *, loss_type, low, high, beta, temperature, max_completion_length):
    """The loss written as its definition reads, a sequence at a time, float64."""
    batch, valid = scored.rollout.batch, scored.scores.valid
    total = torch.zeros((), dtype=torch.float64)
    lengths = batch.lengths
    z = {
        "sum": valid.sum(), "mean": valid.sum(), "token": lengths[valid].sum(),
        "constant": valid.sum() * max_completion_length,
    }[loss_type]  # fmt: skip
    clipped = 0
    for row in valid.nonzero().flatten().tolist():
        n = int(lengths[row])
        logprobs = true_logprobs(model, *tokens_of(batch, row), temperature)
        old, start, a = scored.logprobs[row, :n].double(), ref[row, :n].double(), float(scored.advantages[row])
        ratio = torch.exp(logprobs - old)
        surrogate = torch.minimum(ratio * a, ratio.clip(low, high) * a)
        clipped += int((surrogate != ratio * a).sum())
        d = start - logprobs
        per_token = -surrogate + beta * (torch.exp(d) - d - 1)
        total = total + per_token.sum() / (n if loss_type == "mean" else 1)
    return total / z, clipped


@pytest.mark.parametrize("loss_type", ["sum", "mean", "token", "constant"])
@pytest.mark.parametrize(("epsilon", "epsilon_high", "beta"), [(0.2, 0.28, 0.0), (0.1, None, 0.3), (None, None, 0.3)])
def test_clipped_sega_with_kl_is_float64_autograd(loss_type, epsilon, epsilon_high, beta):
    scored, ref = off_policy(scored_rollout(mask_truncated=True))
    truth = double_model()
    low, high = clip_range(epsilon, epsilon_high)
    loss, clipped = true_sega(
        truth, scored, ref, loss_type=loss_type, low=low, high=high, beta=beta, temperature=0.8,
        max_completion_length=64,
    )  # fmt: skip
    loss.backward()
    assert (clipped > 0) == (epsilon is not None)
    for micro_batch_size in (4, 1):
        trainer = Recorder(tiny_model(), micro_batch_size=micro_batch_size)
        update = SegaUpdate(
            loss_type=loss_type, max_completion_length=64, score_temperature=0.8, epsilon=epsilon,
            epsilon_high=epsilon_high, beta=beta,
        )  # fmt: skip
        result = sega_step(trainer, scored, update, ref_logprobs=ref)
        assert result.loss == pytest.approx(loss.item(), rel=1e-4)
        size = float(gradient_of(truth).abs().max())
        torch.testing.assert_close(trainer.gradient.double(), gradient_of(truth), rtol=1e-3, atol=1e-5 * size)
        tokens = int(scored.rollout.batch.lengths[scored.scores.valid].sum())
        assert result.metrics["clip_ratio/region_mean"] == pytest.approx(clipped / tokens)
        assert result.metrics["kl"] > 0


def test_clipped_loss_by_hand():
    """Ratios 2, 1/2, 2, 1/2 at A = 1, 1, -1, -1, clipped to [0.8, 1.28]: one end of the range holds for each sign."""
    logprobs = torch.tensor([math.log(2), -math.log(2)] * 2, requires_grad=True)
    advantages, weights = torch.tensor([1.0, 1, -1, -1]), torch.ones(4)
    loss = clipped_loss(logprobs, torch.zeros(4), advantages, weights, low=0.8, high=1.28, beta=0.0)
    assert loss.item() == pytest.approx(-1.28 - 0.5 + 2 + 0.8)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, -0.5, 2.0, 0.0]))
    assert clip_range(0.2, None) == pytest.approx((0.8, 1.2)) and clip_range(None, None) == (0.0, math.inf)


def test_k3_by_hand():
    """p(reference) twice and half the policy's: 2 - log 2 - 1 and 1/2 + log 2 - 1; gradient 1 - e^d."""
    logprobs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    ref = torch.tensor([-1.0 + math.log(2), -1.0 - math.log(2), -1.0])
    values = k3(logprobs, ref)
    torch.testing.assert_close(values, torch.tensor([1 - math.log(2), math.log(2) - 0.5, 0.0]))
    values.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-1.0, 0.5, 0.0]))


def test_a_token_without_weight_counts_for_nothing():
    logprobs = torch.tensor([-1.0, -torch.inf], requires_grad=True)
    old, ref, weights = torch.tensor([-1.0, 0.0]), torch.tensor([-1.0, 0.0]), torch.tensor([0.5, 0.0])
    loss = clipped_loss(logprobs, old, torch.ones(2), weights, ref, low=0.8, high=1.2, beta=0.1)
    loss.backward()
    assert loss.item() == -0.5 and logprobs.grad.tolist() == [-0.5, 0.0]


def test_on_policy_the_clipped_gradient_is_the_plain_one():
    scored = scored_rollout()
    plain, clipped = Recorder(tiny_model()), Recorder(tiny_model())
    sega_step(plain, scored, SegaUpdate())
    result = sega_step(clipped, scored, SegaUpdate(epsilon=0.2))
    torch.testing.assert_close(clipped.gradient, plain.gradient, rtol=1e-3, atol=1e-6 * float(plain.gradient.norm()))
    assert result.metrics == {
        "clip_ratio/low_mean": 0, "clip_ratio/high_mean": 0, "clip_ratio/region_mean": 0,
    }  # fmt: skip


def test_kl_runs_groups_without_advantages_and_needs_the_start():
    scored, ref = off_policy(scored_rollout())
    scored = dataclasses.replace(scored, advantages=torch.zeros_like(scored.advantages))
    model = tiny_model()
    for beta in (0.0, 0.1):  # of weights that have not moved the KL term is rounding noise
        assert sega_step(Recorder(model), scored, SegaUpdate(beta=beta), ref_logprobs=ref) is NO_STEP
    advantages = torch.zeros_like(scored.advantages)
    advantages[:2] = torch.tensor([1.0, -1.0])
    scored = dataclasses.replace(scored, advantages=advantages)
    trainer = Recorder(model)
    result = sega_step(trainer, scored, SegaUpdate(beta=0.1), ref_logprobs=ref)
    assert result.num_sequences == 12 and trainer.gradient.norm() > 0
    mask = scored.rollout.batch.completion_mask
    now = measured_stats(Policy(model), scored.rollout.batch, temperature=1.0, batch_size=4).logprobs
    assert result.metrics["kl"] == pytest.approx(float(k3(now.double(), ref.double())[mask].mean()), rel=1e-4)
    assert mean_kl(scored, ref) == pytest.approx(
        float(k3(scored.logprobs.double(), ref.double())[mask].mean()), rel=1e-6
    )
    with pytest.raises(ValueError, match="ref_logprobs"):
        sega_step(trainer, scored, SegaUpdate(beta=0.1))


def test_iterations_move_on_until_the_clip_holds():
    """A large step leaves the range; from then on the clipped tokens of a group push no further."""
    scored = scored_rollout()
    model = tiny_model()
    trainer = trainer_of(model, learning_rate=5e-3, total_steps=8)
    result = sega_step(trainer, scored, SegaUpdate(num_iterations=4, epsilon=0.05))
    assert trainer.num_steps == 4 and result.metrics["clip_ratio/region_mean"] > 0
    assert result.num_tokens == 4 * int(scored.rollout.batch.lengths.sum()) and result.learning_rate == 5e-3
    once = sega_step(trainer_of(tiny_model(), learning_rate=5e-3, total_steps=8), scored, SegaUpdate(epsilon=0.05))
    assert once.metrics["clip_ratio/region_mean"] == 0


def test_micro_batches_do_not_change_several_iterations():
    scored = scored_rollout(reward_scale="group")
    weights = []
    for size in (4, 1):
        model = tiny_model()
        trainer = trainer_of(model, learning_rate=1e-3, total_steps=8, max_grad_norm=1e9, micro_batch_size=size)
        sega_step(trainer, scored, SegaUpdate(num_iterations=3, epsilon=0.2))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in tiny_model().parameters()])
    assert (weights[0] - start).norm() > 0.05
    assert (weights[1] - weights[0]).norm() < 0.02 * (weights[0] - start).norm()


# DPO.


def dpo_pairs():
    return [
        TokenizedPair(encode(f"q{i}?" + "x" * i), (*encode("a b " * (i + 1)), END), (*encode("c" * (5 - i)), END), None)
        for i in range(4)
    ]


def test_dpo_is_float64_autograd():
    pairs, beta = dpo_pairs(), 0.25
    ref = pair_logprobs(Policy(tiny_model(seed=5)), pairs, pad_id=0, batch_size=2)
    truth = double_model()
    start = tiny_model(seed=5).double()
    loss, won = torch.zeros((), dtype=torch.float64), 0.0
    for i, pair in enumerate(pairs):

        def total(model, answer, pair=pair):
            return true_logprobs(model, torch.tensor(pair.prompt_ids), torch.tensor(answer)).sum()

        with torch.no_grad():
            expected = torch.stack([total(start, pair.chosen_ids), total(start, pair.rejected_ids)])
        assert_near(ref[i].double(), expected)
        margin = total(truth, pair.chosen_ids) - expected[0] - total(truth, pair.rejected_ids) + expected[1]
        loss = loss - torch.log(torch.sigmoid(beta * margin)) / len(pairs)
        won += float(margin > 0) / len(pairs)
    loss.backward()
    for size in (4, 3, 1):
        trainer = Recorder(tiny_model(), micro_batch_size=size)
        result = dpo_step(trainer, pairs, ref, DpoUpdate(dpo_beta=beta), pad_id=0)
        assert result.loss == pytest.approx(loss.item(), rel=1e-4)
        size_of = float(gradient_of(truth).abs().max())
        torch.testing.assert_close(trainer.gradient.double(), gradient_of(truth), rtol=1e-3, atol=1e-5 * size_of)
        assert result.metrics["rewards/accuracies"] == pytest.approx(won)
        assert result.num_sequences == 8


def test_dpo_starts_at_log_two():
    """Where nothing has moved every margin is 0: loss log 2, rewards 0, a tie counts half."""
    pairs = dpo_pairs()
    ref = pair_logprobs(Policy(tiny_model()), pairs, pad_id=0, batch_size=4)
    result = dpo_step(Recorder(tiny_model()), pairs, ref, DpoUpdate(dpo_beta=0.1), pad_id=0)
    assert result.loss == pytest.approx(math.log(2), rel=1e-5)
    assert result.metrics["rewards/chosen"] == pytest.approx(0, abs=1e-5)


def test_dpo_by_hand(monkeypatch):
    """Log-probs -3 and -5 against -4 and -4: margin 2, loss -log sigma(0.5 * 2), rewards 0.5 and -0.5."""
    values = torch.tensor([[-3.0], [-5.0]], requires_grad=True)
    stats = type("Stats", (), {"logprobs": values})
    monkeypatch.setattr("gem.update.dpo.completion_stats", lambda *_, **__: stats)
    trainer = trainer_of(tiny_model(), learning_rate=0.0, micro_batch_size=1)
    pairs, ref = dpo_pairs()[:1], torch.tensor([[-4.0, -4.0]])
    result = dpo_step(trainer, pairs, ref, DpoUpdate(dpo_beta=0.5), pad_id=0)
    assert result.loss == pytest.approx(-math.log(1 / (1 + math.exp(-1))), rel=1e-6)
    assert result.metrics == pytest.approx(
        {"rewards/chosen": 0.5, "rewards/rejected": -0.5, "rewards/accuracies": 1.0, "rewards/margins": 1.0}
    )
    slope = 0.5 * (1 / (1 + math.exp(-1)) - 1)  # dpo_beta * (sigma - 1) to the chosen, its opposite to the rejected
    torch.testing.assert_close(values.grad, torch.tensor([[slope], [-slope]]))


def test_filtered_pairs_are_the_best_and_the_worst_by_their_own_ids():
    scored = scored_rollout()
    pairs = filtered_pairs(scored)
    assert len(pairs) == 4
    rewards = scored.rewards.view(4, 3)
    for i, pair in enumerate(pairs):
        prompt, best = tokens_of(scored.rollout.batch, 3 * i + int(rewards[i].argmax()))
        _, worst = tokens_of(scored.rollout.batch, 3 * i + int(rewards[i].argmin()))
        assert pair.prompt_ids == tuple(prompt.tolist())
        assert (pair.chosen_ids, pair.rejected_ids) == (tuple(best.tolist()), tuple(worst.tolist()))


# The starting policy.


def trained(model, scored, steps=2):
    trainer = trainer_of(model, learning_rate=1e-2, total_steps=9)
    for _ in range(steps):
        sega_step(trainer, scored, SegaUpdate())
    return model


@pytest.mark.parametrize("kind", ["full", "lora", "lora trained before"])
def test_the_starting_policy_is_kept(kind):
    scored = scored_rollout()
    batch = scored.rollout.batch
    model = tiny_model()
    if kind != "full":
        torch.manual_seed(0)
        model = add_lora(model, Lora(lora_r=4))
    if kind == "lora trained before":
        trained(model, scored)

    def logprobs(model):
        return measured_stats(Policy(model), batch, temperature=1.0, batch_size=4).logprobs

    start = logprobs(model)
    reference = StartingPolicy(model)
    kept = sum(value.numel() for value in reference.kept.values())
    assert kept == (0 if kind == "lora" else sum(p.numel() for p in model.parameters() if p.requires_grad))
    saved = reference.state_dict()
    trained(model, scored)
    now = logprobs(model)
    assert (now - start).abs().max() > 1e-2
    for _ in range(2):
        with reference.active() as policy:
            assert torch.equal(logprobs(policy), start)
        assert torch.equal(logprobs(model), now)
    trained(model, scored, steps=1)  # the optimizer still moves the policy, not the reference
    later = StartingPolicy(model)
    later.load_state_dict(saved)
    for kept in (reference, later):
        with kept.active() as policy:
            assert torch.equal(logprobs(policy), start)
    assert not torch.equal(logprobs(model), now)


def test_lora_sega_step_moves_the_adapter_alone():
    scored = scored_rollout()
    torch.manual_seed(0)
    model = add_lora(tiny_model(), Lora(lora_r=4))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = measured_stats(Policy(model), scored.rollout.batch, temperature=1.0, batch_size=4).logprobs
    trainer = trainer_of(model, learning_rate=1e-2, total_steps=9)
    reference = StartingPolicy(model)
    for _ in range(3):
        with reference.active() as policy:
            ref = measured_stats(Policy(policy), scored.rollout.batch, temperature=1.0, batch_size=4).logprobs
        assert torch.equal(ref, before)
        sega_step(trainer, scored, SegaUpdate(beta=0.1, num_iterations=2, epsilon=0.2), ref_logprobs=ref)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    after = measured_stats(Policy(model), scored.rollout.batch, temperature=1.0, batch_size=4).logprobs
    assert float(((after - before).sum(1) * scored.advantages).sum()) > 0


def test_measured_statistics_are_the_statistics_unpadded():
    rows = [(*encode("x"), END), (*encode("long answer"), END)] * 2
    rollout = given_completions(FORM, [encode("q"), encode("a longer question")], rows)
    model = tiny_model()
    whole = completion_stats(Policy(model), rollout.batch).logprobs
    for size in (1, 2):
        found = measured_stats(Policy(model), rollout.batch, temperature=1.0, batch_size=size).logprobs
        assert_near(found, whole.detach())
        assert bool((found[~rollout.batch.completion_mask] == 0).all())


# Weights of 16 bits.


def test_small_steps_are_not_lost_in_bfloat16():
    """A hundred steps of 1e-6 on weights of about 0.3: none alone moves a bfloat16; together they are in the master."""
    model = tiny_model().bfloat16()
    trainer = trainer_of(model, learning_rate=1e-6, total_steps=200)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(100):
        trainer.backward(sum(p.float().sum() for p in model.parameters()))
        assert trainer.step().grad_norm > 0
    assert all(master.dtype == torch.float32 for master in trainer.parameters)
    for p, old, master in zip(model.parameters(), before, trainer.parameters):
        torch.testing.assert_close(old.float() - master, torch.full_like(master, 1e-4), rtol=1e-2, atol=1e-5)
        assert torch.equal(p, master.bfloat16()) and p.grad is None
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before))

    saved = trainer.state_dict()
    again = tiny_model().bfloat16()
    again.load_state_dict(model.state_dict())
    later = trainer_of(again, learning_rate=1e-6, total_steps=200)
    later.load_state_dict(saved)
    for one in (trainer, later):
        for p in one.trained:
            one.backward((p.float() ** 2).sum())
        one.step()
    assert all(torch.equal(a, b) for a, b in zip(trainer.parameters, later.parameters))


def test_gradients_of_micro_batches_are_added_in_float32():
    model = tiny_model().bfloat16()
    trainer = trainer_of(model, learning_rate=0.0, total_steps=1)
    weight = next(model.parameters())
    for _ in range(257):  # in bfloat16 256 + 1 is 256
        trainer.backward(weight.float().sum())
    assert float(trainer.parameters[0].grad.max()) == 257


def test_weights_that_are_set_from_outside_win_over_their_masters():
    model = tiny_model().bfloat16()
    trainer = trainer_of(model, learning_rate=0.0, total_steps=9)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    values = [p.detach().clone() for p in model.parameters()]
    trainer.backward(sum(p.float().sum() for p in model.parameters()))
    trainer.step()
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values))


def test_float32_weights_are_their_own_masters():
    model = tiny_model()
    trainer = trainer_of(model, learning_rate=0.0, total_steps=1)
    assert all(a is b for a, b in zip(trainer.parameters, model.parameters()))


def test_a_sega_step_in_bfloat16_follows_float32():
    scored = scored_rollout()
    updates = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model().to(dtype)
        trainer = trainer_of(model, learning_rate=1e-3, total_steps=9)
        start = torch.cat([p.detach().float().flatten() for p in trainer.parameters])
        sega_step(trainer, scored, SegaUpdate(epsilon=0.2))
        updates.append(torch.cat([p.detach().flatten() for p in trainer.parameters]) - start)
    assert float(torch.cosine_similarity(*updates, dim=0)) > 0.7
