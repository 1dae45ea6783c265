"""Guards by hand: each fires beyond its limit and not at it; what repeats; where the comparisons begin."""

import math

import pytest
import torch

from gem.config.read import build_config
from gem.config.settings import GuardSettings, Scoring
from gem.model.forward import Policy
from gem.rollout.sample import given_completions
from gem.run.guards import Baseline, Breach, Guards, breaches, lowered, next_baseline
from gem.run.metrics import fork_repetition
from gem.scoring.forks import fork_tokens, repeated_tokens
from gem.scoring.score import score_rollout
from tests.helpers import END, FORM, encode, rollout_of, tiny_model

START = Baseline(mean_length=40.0, span_rate=0.8, best_preference=0.75)
CALM = {
    "kl": 0.5, "completions/mean_length": 80.0, "gem/fork_repetition": 0.5, "gem/answer_span_found": 0.4,
    "gem/h_final": 0.01, "eval/preference_accuracy": 0.65,
}  # fmt: skip


def guards(action="warn", **values):
    return Guards(build_config({"model": "m", "train_file": "t", "output_dir": "o", "guards": action, **values}))


def test_at_the_limits_nothing_fires():
    assert breaches(CALM, START, GuardSettings()) == []
    assert breaches({**CALM, "completions/mean_length": 20.0}, START, GuardSettings()) == []


@pytest.mark.parametrize(
    ("guard", "key", "value", "limit"),
    [
        ("kl", "kl", 0.51, 0.5),
        ("kl", "kl", math.inf, 0.5),
        ("length", "completions/mean_length", 80.5, 80.0),
        ("length", "completions/mean_length", 19.5, 20.0),
        ("repetition", "gem/fork_repetition", 0.51, 0.5),
        ("span_rate", "gem/answer_span_found", 0.39, 0.4),
        ("h_final", "gem/h_final", 0.009, 0.01),
        ("preference", "eval/preference_accuracy", 0.64, 0.65),
    ],
)
def test_beyond_its_limit_each_fires_alone(guard, key, value, limit):
    (breach,) = breaches({**CALM, key: value}, START, GuardSettings())
    assert (breach.guard, breach.value, breach.limit) == (guard, value, pytest.approx(limit))
    assert f"{value:.4g}" in breach.message and f"{limit:.4g}" in breach.message


def test_what_is_missing_or_nan_fires_nothing():
    assert breaches({}, START, GuardSettings()) == []
    assert breaches(dict.fromkeys(CALM, math.nan), START, GuardSettings()) == []
    assert breaches({**CALM, "completions/mean_length": 1e6}, Baseline(), GuardSettings()) == []


def test_the_start_is_the_first_step_and_the_best_evaluation_moves_on():
    watch = guards(guard_length_ratio=1.5, guard_preference_drop=0.2)
    assert watch.check({"eval/preference_accuracy": 0.6}) == []
    assert watch.check({"completions/mean_length": 10, "gem/answer_span_found": 1.0}) == []
    assert watch.check({"completions/mean_length": 14, "gem/answer_span_found": 0.6}) == []
    assert [b.guard for b in watch.check({"completions/mean_length": 16, "gem/answer_span_found": 0.4})] == [
        "length",
        "span_rate",
    ]
    assert watch.check({"eval/preference_accuracy": 0.9}) == []
    assert watch.check({"eval/preference_accuracy": 0.71}) == []
    assert [b.guard for b in watch.check({"eval/preference_accuracy": 0.69})] == ["preference"]
    assert watch.baseline == Baseline(10, 1.0, 0.9)
    again = guards()
    again.load_state_dict(watch.state_dict())
    assert again.baseline == watch.baseline
    assert next_baseline({"eval/preference_accuracy": 0.5}, watch.baseline) == watch.baseline


def test_off_is_off_and_the_settings_are_the_limits():
    assert guards("off").check({"kl": 9.0}) == []
    watch = guards("stop", guard_kl=0.1)
    assert watch.action == "stop"
    assert watch.check({"kl": 0.2}) == [
        Breach("kl", 0.2, 0.1, "KL from the starting policy (nats a token) is 0.2, limit 0.1")
    ]
    assert lowered(lowered(1.0)) == 0.25


def test_fork_tokens_by_hand():
    """Ten reasoning tokens of which the share 0.2 is two; a completion without answer reasons for its first 4/5."""
    entropy = torch.tensor([[3.0, 1, 5, 1, 1, 1, 1, 1, 1, 5, 9, 9], [1.0, 2, 3, 4, 9, 0, 0, 0, 0, 0, 0, 0]])
    mask = torch.arange(12) < torch.tensor([[12], [5]])
    start = torch.tensor([10, 99])
    fork = fork_tokens(entropy, mask, start, 0.2)
    assert fork.nonzero().tolist() == [[0, 2], [0, 9], [1, 3]]
    assert fork_tokens(entropy, mask, start, 3).sum(1).tolist() == [3, 3]
    assert fork_tokens(entropy, mask, torch.tensor([0, 0]), 0.2).sum() == 0


def test_repeated_tokens_by_hand():
    """1 2 3 1 2 3 1: with pairs, the second (1 2), (2 3), (3 1) repeat; across the padding nothing does."""
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 1], [1, 1, 1, 1, 1, 1, 1]])
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    assert repeated_tokens(ids, mask, 2).tolist() == [
        [False, False, False, False, True, True, True],
        [False, False, True, False, False, False, False],
    ]
    assert repeated_tokens(ids, mask).sum(1).tolist() == [1, 0]  # (1 2 3 1) alone


def test_repetition_of_a_rollout_is_the_mean_share():
    rollout = rollout_of(num_prompts=2)
    scored = score_rollout(Policy(tiny_model()), rollout, Scoring(), batch_size=2)
    batch = rollout.batch
    fork = fork_tokens(scored.entropy, batch.completion_mask, rollout.spans.answer_start, 1.0)
    repeats = repeated_tokens(batch.completion_ids, batch.completion_mask)
    shares = [float(repeats[i][fork[i]].double().mean()) for i in range(4) if fork[i].any()]
    assert 0 < len(shares) <= 4
    assert fork_repetition(scored, 1.0) == pytest.approx(sum(shares) / len(shares))
    assert fork_repetition(scored, 1.0) < 0.5
    looped = score_rollout(Policy(tiny_model()), _loop(), Scoring(), batch_size=1)
    assert fork_repetition(looped, 1.0) > 0.5


def _loop():
    return given_completions(FORM, [encode("q")], [(*encode("on and " * 20 + "Final Answer: 1"), END)] * 2)
