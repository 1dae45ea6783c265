"""Evaluation: preference accuracy is honest, its interval is Wilson's, and greedy answers are matched."""

import dataclasses
import io

import pytest
import torch
from rich.console import Console

from gem.config.settings import EvaluationSettings, Sampling, Scoring
from gem.data.batches import TokenizedPair
from gem.evaluation import evaluate as evaluation
from gem.evaluation.evaluate import CandidateSettings, evaluate, reward_differences, sampled_answers
from gem.model.forward import Policy, pair_logprobs
from gem.rollout.sample import given_completions
from gem.scoring.score import rank_candidates
from gem.statistics import wilson_interval
from tests.helpers import FORM, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id
MODEL = tiny_model()


def pair(prompt, chosen, rejected, answer=None):
    encode = TOKENIZER.encode
    return TokenizedPair(tuple(encode(prompt)), (*encode(chosen), END), (*encode(rejected), END), answer)


# Prompts from long to short: evaluation sorts them the other way.
PAIRS = [pair("q" * (8 - i), "yes" * (1 + i % 3), "no, " * (1 + i % 4)) for i in range(7)]


def alone(prompt_ids, answer_ids):
    with torch.no_grad():
        logprobs = MODEL(torch.tensor([prompt_ids + answer_ids])).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
    return float(logprobs[torch.arange(len(answer_ids)), torch.tensor(answer_ids)].double().sum())


def run(pairs, *, reduction="sum", reference=None, **more):
    return evaluate(
        Policy(MODEL),
        FORM,
        pairs,
        EvaluationSettings(**{"eval_generate": 8, "eval_sample": 2, "eval_batch_size": 4, **more}),
        CandidateSettings(Sampling(num_generations=3, max_completion_length=8), Scoring()),
        console=Console(file=io.StringIO()),
        name="test",
        reduction=reduction,
        reference=reference,
    )


def preference_accuracy(pairs):
    return run(pairs, eval_generate=0, eval_sample=0).preference


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_rewards_are_log_probs_of_whole_answers_in_the_order_of_the_pairs(batch_size):
    rewards = pair_logprobs(Policy(MODEL), PAIRS, pad_id=0, batch_size=batch_size)
    for row, one in zip(rewards.tolist(), PAIRS):
        for value, ids in zip(row, (one.chosen_ids, one.rejected_ids)):
            assert value == pytest.approx(alone(one.prompt_ids, ids), rel=1e-4)


def test_differences_by_hand():
    pairs = [pair("q", "ab", "abcd")]  # 3 and 5 tokens, the end one of them
    logprobs, reference = torch.tensor([[-6.0, -5.0]]), torch.tensor([[-7.0, -9.0]])
    found = reward_differences(logprobs, pairs, reference)
    assert {kind: value.item() for kind, value in found.items()} == {"sum": -1.0, "mean": -1.0, "relative": -3.0}
    assert set(reward_differences(logprobs, pairs)) == {"sum", "mean"}


def test_accuracy_counts_wins_and_half_of_ties():
    ties = [pair(prompt, "same", "same") for prompt in ("q", "w")]
    accuracy = preference_accuracy([*PAIRS, *ties])
    wins = sum(alone(p.prompt_ids, p.chosen_ids) > alone(p.prompt_ids, p.rejected_ids) for p in PAIRS)
    assert accuracy.accuracy == pytest.approx((wins + 1) / 9)
    assert accuracy.num_pairs == 9
    assert (accuracy.low, accuracy.high) == wilson_interval(wins + 1, 9)


def test_exchanging_the_answers_mirrors_the_accuracy():
    swapped = [dataclasses.replace(p, chosen_ids=p.rejected_ids, rejected_ids=p.chosen_ids) for p in PAIRS]
    one, other = (preference_accuracy(pairs) for pairs in (PAIRS, swapped))
    assert one.accuracy + other.accuracy == pytest.approx(1)
    assert one.margin == pytest.approx(-other.margin, rel=1e-4)


def test_pairs_of_one_prompt_are_not_independent():
    """Each pair four times: the same accuracy, and an interval that is no narrower than that of the prompts."""
    one = preference_accuracy(PAIRS)
    copies = preference_accuracy(PAIRS * 4)
    assert copies.accuracy == one.accuracy and copies.num_pairs == 28
    assert copies.high - copies.low > 0.8 * (one.high - one.low)
    assert (copies.margin_low, copies.margin_high) == pytest.approx((one.margin_low, one.margin_high), rel=1e-4)


def test_unknown_answers_and_no_samples_give_no_numbers():
    result = run(PAIRS, eval_sample=0)
    assert result.answers is None and result.candidates is None
    assert result.preference.num_pairs == 7


def test_candidates_of_each_prompt_are_scored_the_same_way_twice():
    one, two = run(PAIRS), run(PAIRS)
    assert one.candidates == two.candidates and one.sampled is None  # no known answers
    assert one.candidates.num_candidates == 6 and one.candidates.mean_length <= 8
    assert one.candidates.score == pytest.approx(one.candidates.h_fork - one.candidates.h_final, abs=1e-5)


def test_the_reference_makes_rewards_relative():
    start = run(PAIRS, eval_sample=0)
    assert set(start.preferences) == {"sum", "mean"} and start.preference == start.preferences["sum"]
    same = run(PAIRS, eval_sample=0, reduction="relative", reference=start.logprobs)
    assert same.preference.accuracy == 0.5 and same.preference.margin == 0  # all ties
    assert same.calibration.brier.value == 0.25 and same.preferences["sum"] == start.preference
    tilted = start.logprobs - torch.tensor([1.0, 0.0])
    assert run(PAIRS, eval_sample=0, reduction="relative", reference=tilted).preference.accuracy == 1.0
    assert run(PAIRS, eval_sample=0, reduction="mean").preference == start.preferences["mean"]


def rollout_of(*texts, size):
    rows = [[*TOKENIZER.encode(text), END] for text in texts]
    prompts = [[5, 6]] * (len(rows) // size)
    return given_completions(FORM, prompts, rows)


def test_right_and_wrong_candidates():
    """Two known problems and one unknown: majority, the best by score, and AUROC by hand."""
    says = [f"x Final Answer: {n}" for n in (4, 4, 5, 9, 8, 7, 1, 1, 1)]
    rollout = rollout_of(*says, size=3)
    entropy = torch.zeros(rollout.batch.completion_ids.shape)
    entropy[:, 0] = torch.tensor([3.0, 1, 2, 1, 2, 3, 9, 9, 9])  # H_fork, and so the score
    scored = rank_candidates(rollout, entropy, entropy, Scoring(top_m=1))
    pairs = [pair("a", "x", "y", "4"), pair("b", "x", "y", "7"), pair("c", "x", "y")]
    result = sampled_answers(scored, pairs)
    assert result.accuracy.value == pytest.approx(3 / 6) and result.accuracy.count == 6
    assert result.majority.value == 0.5  # 4 of {4, 4, 5}; of {9, 8, 7} the first
    assert result.best_score.value == 1.0
    # Right 3, 1, 3 against wrong 2, 1, 2: 3 + 0.5 + 3 of 9; within: (1 + 0) of 2 and 2 of 2.
    assert result.auroc.value == pytest.approx(6.5 / 9) and result.auroc_within.value == pytest.approx(3 / 4)
    assert sampled_answers(scored, [pair("a", "x", "y")] * 3) is None


def test_all_wrong_candidates_have_no_auroc():
    rollout = rollout_of("a", "b", "c Final Answer: 1", "d", size=2)
    scored = rank_candidates(rollout, torch.rand(4, rollout.batch.completion_ids.shape[1]), torch.rand(
        4, rollout.batch.completion_ids.shape[1]), Scoring())  # fmt: skip
    result = sampled_answers(scored, [pair("a", "x", "y", "4"), pair("b", "x", "y", "4")])
    assert result.auroc is None and result.auroc_within is None and result.accuracy.value == 0


def test_answers_are_matched_where_they_are_known(monkeypatch):
    """The sampler is replaced by one that says 4 to all; the problems want 4, 5 and something unknown."""
    said = [*TOKENIZER.encode("2 + 2. Final Answer: $4.00"), END]
    rollouts = []

    def says_four(policy, form, prompts, sampling, **more):
        rollouts.append(sampling)
        return given_completions(form, prompts, [said] * len(prompts))

    monkeypatch.setattr(evaluation, "roll_out", says_four)
    pairs = [pair("a", "x", "y", "4"), pair("b", "x", "y", "5"), pair("c", "x", "y")]
    result = run(pairs, eval_sample=0)
    assert result.answers.accuracy == 0.5 and result.answers.num_problems == 2
    assert result.answers.answer_span_found == 1.0
    assert rollouts[0].temperature == 0 and rollouts[0].num_generations == 1
