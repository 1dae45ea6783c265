"""Evaluation: preference accuracy is honest, its interval is Wilson's, and greedy answers are matched."""

import dataclasses
import io

import pytest
import torch
from gem_tiny import tiny_model, tiny_tokenizer
from rich.console import Console

from gem import evaluate as evaluation
from gem.data import TokenizedPair
from gem.evaluate import evaluate, implicit_rewards, preference_accuracy, wilson_interval
from gem.filtering import Scoring
from gem.rollout import Sampling

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


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_rewards_are_log_probs_of_whole_answers_in_the_order_of_the_pairs(batch_size, reduction):
    rewards = implicit_rewards(MODEL, PAIRS, pad_id=0, reduction=reduction, batch_size=batch_size)
    for row, one in zip(rewards.tolist(), PAIRS):
        for value, ids in zip(row, (one.chosen_ids, one.rejected_ids)):
            truth = alone(one.prompt_ids, ids) / (len(ids) if reduction == "mean" else 1)
            assert value == pytest.approx(truth, rel=1e-4)


def test_accuracy_counts_wins_and_half_of_ties():
    tie = pair("q", "same", "same")
    accuracy = preference_accuracy(MODEL, [*PAIRS, tie, tie], pad_id=0)
    wins = sum(alone(p.prompt_ids, p.chosen_ids) > alone(p.prompt_ids, p.rejected_ids) for p in PAIRS)
    assert accuracy.accuracy == pytest.approx((wins + 1) / 9)
    assert accuracy.num_pairs == 9
    assert (accuracy.low, accuracy.high) == wilson_interval(wins + 1, 9)


def test_exchanging_the_answers_mirrors_the_accuracy():
    swapped = [dataclasses.replace(p, chosen_ids=p.rejected_ids, rejected_ids=p.chosen_ids) for p in PAIRS]
    one, other = (preference_accuracy(MODEL, pairs, pad_id=0) for pairs in (PAIRS, swapped))
    assert one.accuracy + other.accuracy == pytest.approx(1)
    assert one.margin == pytest.approx(-other.margin, abs=1e-4)


def test_wilson_interval_by_hand():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def run(pairs, **more):
    arguments = {"num_generate": 8, "num_sample": 2, "reduction": "sum", "batch_size": 4, "seed": 0, **more}
    console = Console(file=io.StringIO())
    return evaluate(
        MODEL, TOKENIZER, pairs, sampling=Sampling(3, 8), scoring=Scoring(), end_token_ids=[END],
        marker="Final Answer:", console=console, name="test", **arguments,
    )  # fmt: skip


def test_unknown_answers_and_no_samples_give_no_numbers():
    result = run(PAIRS, num_sample=0)
    assert result.answers is None and result.candidates is None
    assert result.preference.num_pairs == 7


def test_candidates_of_each_prompt_are_scored_the_same_way_twice():
    one, two = run(PAIRS), run(PAIRS)
    assert one.candidates == two.candidates
    assert one.candidates.num_candidates == 6 and one.candidates.mean_length <= 8
    assert one.candidates.score == pytest.approx(one.candidates.h_fork - one.candidates.h_final, abs=1e-5)


def test_answers_are_matched_where_they_are_known(monkeypatch):
    """The sampler is replaced by one that says 4 to all; the problems want 4, 5 and something unknown."""
    said = [*TOKENIZER.encode("2 + 2. Final Answer: $4.00"), END]
    rollouts = []

    def says_four(model, tokenizer, prompts, sampling, **more):
        rollouts.append(sampling)
        more = {key: more[key] for key in ("end_token_ids", "marker")}
        from gem.rollout import given_completions

        return given_completions(tokenizer, prompts, [said] * len(prompts), **more)

    monkeypatch.setattr(evaluation, "roll_out", says_four)
    pairs = [pair("a", "x", "y", "4"), pair("b", "x", "y", "5"), pair("c", "x", "y")]
    result = run(pairs, num_sample=0)
    assert result.answers.accuracy == 0.5 and result.answers.num_problems == 2
    assert result.answers.answer_span_found == 1.0
    assert rollouts[0].temperature == 0 and rollouts[0].num_generations == 1
