"""Filtering: scores of a rollout, what counts in a group, and which statistics they are made of."""

import dataclasses
import math

import pytest
import torch

from gem.config.settings import Scoring
from gem.model.forward import Policy
from gem.rollout.sample import given_completions
from gem.scoring import score
from gem.scoring.score import overlong_penalty, rank_candidates, ranking_metrics, score_rollout
from gem_kernels import LinearScore, group_advantages
from tests.helpers import FORM, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id


def rollout_of(*texts, groups=1, ended=True):
    rows = [[*TOKENIZER.encode(text), *([END] if ended else [])] for text in texts]
    return given_completions(FORM, [[5, 6]] * groups, rows)


TEXTS = ("a b Final Answer: 1", "cc Final Answer: 22", "d Final Answer: 3", "no answer here")


def ranked(scoring=None, texts=TEXTS, seed=0, rollout=None):
    rollout = rollout or rollout_of(*texts)
    entropy = torch.rand(rollout.batch.completion_ids.shape, generator=torch.Generator().manual_seed(seed))
    entropy = entropy * rollout.batch.completion_mask
    return rank_candidates(rollout, -entropy, entropy, scoring or Scoring())


def test_plain_scores_become_centred_advantages():
    scored = ranked()
    scores = scored.scores
    assert torch.allclose(scores.score, scores.fork_entropy - scores.final_entropy)
    assert torch.equal(scored.advantages, group_advantages(scores.score, 4))
    assert torch.equal(scored.rewards, scores.score.double()) and scores.valid.all() and not scored.trimmed.any()
    best, worst = int(scores.score.argmax()), int(scores.score.argmin())
    assert scored.pairs.tolist() == [[best, worst]]


@pytest.mark.parametrize(("final_weight", "fork_weight"), [(0.0, 1.0), (1.0, 0.0), (2.0, 0.5)])
def test_weights_of_the_two_terms(final_weight, fork_weight):
    scores = ranked(Scoring(final_weight=final_weight, fork_weight=fork_weight)).scores
    truth = fork_weight * scores.fork_entropy - final_weight * scores.final_entropy
    assert torch.allclose(scores.score, truth, atol=1e-6)
    assert scores.final_entropy.min() > 0 and scores.fork_entropy.min() > 0


def test_answerless_and_truncated_candidates_are_left_out():
    scored = ranked(Scoring(no_answer="exclude"))
    assert scored.scores.valid.tolist() == [True, True, True, False]
    assert scored.advantages[3] == 0 and abs(scored.advantages.sum()) < 1e-6
    scored = ranked(Scoring(mask_truncated=True), rollout=rollout_of(*TEXTS, ended=False))
    assert not scored.scores.valid.any() and len(scored.pairs) == 0 and math.isnan(scored.pairs_decided)
    assert (scored.advantages == 0).all()


def test_trimmed_candidates_have_no_part_in_their_group():
    scored = ranked(Scoring(trim="rank", trim_share=0.25))
    order = scored.scores.score.argsort().tolist()
    assert scored.trimmed.nonzero().flatten().tolist() == sorted([order[0], order[3]])
    assert torch.equal(scored.scores.valid, ~scored.trimmed)
    middle = scored.scores.score[order[1:3]]
    assert scored.advantages[order[1:3]].tolist() == pytest.approx((middle - middle.mean()).tolist(), abs=1e-6)
    assert (scored.advantages[scored.trimmed] == 0).all() and scored.pairs.tolist() == [[order[2], order[1]]]


def test_bradley_terry_strengths_as_reward():
    scored = ranked(Scoring(ranking="bradley_terry"))
    assert torch.equal(scored.rewards, scored.strengths)
    assert scored.advantages.tolist() == pytest.approx(scored.strengths.tolist(), abs=1e-6)  # they are centred
    assert scored.standard_errors.min() > 0


def test_overlong_penalty_by_hand():
    lengths = torch.tensor([1, 10, 12, 15, 20, 30])
    assert overlong_penalty(lengths, 20, 10).tolist() == pytest.approx([0, 0, -0.2, -0.5, -1, -1])
    plain, penalized = ranked(), ranked(Scoring(overlong_buffer=10, overlong_penalty=2.0, max_completion_length=22))
    lengths = plain.rollout.batch.lengths
    assert (lengths > 12).any()
    change = 2 * overlong_penalty(lengths, 22, 10)
    assert torch.allclose(penalized.rewards, plain.rewards + change)
    assert torch.equal(penalized.scores.score, plain.scores.score)
    centred = penalized.rewards - penalized.rewards.mean()
    assert penalized.advantages.tolist() == pytest.approx(centred.tolist(), abs=1e-6)


def test_equal_completions_make_no_pair():
    rollout = rollout_of("x Final Answer: 1", "x Final Answer: 1", "x Final Answer: 1", "y Final Answer: 2", groups=2)
    scored = ranked(rollout=rollout)
    assert scored.scores.score[0] != scored.scores.score[1]
    assert len(scored.pairs) == 1 and set(scored.pairs[0].tolist()) == {2, 3}


def test_recorded_statistics_replace_the_forward(monkeypatch):
    model, rollout = tiny_model(), rollout_of(*TEXTS)
    scored = score_rollout(Policy(model), rollout, Scoring(), batch_size=1)
    recorded = dataclasses.replace(rollout, logprobs=scored.logprobs, entropy=scored.entropy)
    monkeypatch.setattr(score, "measured_stats", None)  # calling the model now fails
    again = score_rollout(Policy(model), recorded, Scoring(), batch_size=1)
    assert torch.equal(again.scores.score, scored.scores.score) and again.entropy is recorded.entropy
    with pytest.raises(TypeError):
        score_rollout(Policy(model), rollout, Scoring(), batch_size=1)


def test_metrics_name_what_was_found_and_left_out():
    row = ranking_metrics(ranked(Scoring(no_answer="exclude", trim="mad")))
    assert row["gem/valid"] == 0.75 and row["gem/answer_span/marker"] == 0.75 and row["gem/trimmed"] == 0
    assert 0 <= row["gem/pairs_decided"] <= 1 and row["gem/score_standard_error"] > 0
    nothing = ranking_metrics(ranked(Scoring(no_answer="exclude"), texts=("a", "b")))
    assert "gem/pairs_decided" not in nothing and nothing["gem/valid"] == 0


def test_scores_that_are_not_numbers_are_not_hidden():
    rollout = rollout_of(*TEXTS)
    entropy = torch.rand(rollout.batch.completion_ids.shape).masked_fill(torch.tensor([[True], [False]] * 2), torch.nan)
    assert rank_candidates(rollout, entropy, entropy, Scoring()).advantages.isnan().any()


def test_a_linear_score_takes_the_paper_s_place():
    """Rewards, advantages and pairs are made of it; the features are those of gem_kernels."""
    rollout = given_completions(FORM, [[5, 6]], [[7, 8, END], [9, END]])
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -0.5, 0.0]])
    entropy = torch.tensor([[0.5, 1.0, 1.5], [2.0, 3.0, 0.0]])
    linear = LinearScore({"mean_logprob": 2.0, "length": -1.0}, {"length": 4.0})
    scored = rank_candidates(rollout, logprobs, entropy, Scoring(), linear)
    assert scored.scores.score.tolist() == pytest.approx([2 * -2.0 - 3 / 4, 2 * -0.5 - 2 / 4])
    assert scored.rewards.tolist() == pytest.approx(scored.scores.score.tolist())
    assert scored.pairs.tolist() == [[1, 0]] and scored.features.length.tolist() == [3.0, 2.0]
    paper = rank_candidates(rollout, logprobs, entropy, Scoring())
    assert paper.scores.score[1] == pytest.approx(2.0 - 3.0) and paper.pairs.tolist() != scored.pairs.tolist()
