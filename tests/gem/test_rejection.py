"""Which candidates rejection sampling learns, by hand; and the mean of the weights before and after."""

import math

import pytest
import torch

from gem.config.settings import Lora, Scoring
from gem.model.lora import add_lora
from gem.model.starting_policy import StartingPolicy
from gem.rollout.sample import given_completions
from gem.scoring.score import rank_candidates
from gem.update.rejection import agreement_of, choose_winners
from gem_kernels import LinearScore
from tests.helpers import END, FORM, encode, tiny_model

SCORE = LinearScore({"sum_logprob": 1.0})


def scored(texts, scores, groups, ended=True):
    """Candidates with these texts whose score, the log-prob of the whole, is as given."""
    rows = [[*encode(text), END] if ended else encode(text) for text in texts]
    prompts = [[5 + i, 6] for i in range(groups)]
    rollout = given_completions(FORM, prompts, rows)
    logprobs = torch.zeros(rollout.batch.completion_ids.shape)
    logprobs[:, 0] = torch.tensor(scores)
    return rank_candidates(rollout, logprobs, torch.zeros_like(logprobs), Scoring(), SCORE)


def test_the_best_of_the_heaviest_answer():
    """Weights e^0, e^-1, e^-1 and e^-1: answer 7 has one candidate and 0.475, answer 8 three and 0.525."""
    texts = ["Final Answer: 7", "Final Answer: 8", "a\nFinal Answer: 8", "b\nFinal Answer: $8.00"]
    (winner,) = choose_winners(scored(texts, [0.0, -1.0, -1.0 + 1e-3, -1.0], 1))
    assert winner.row == 2
    assert winner.agreement == pytest.approx(3 / (3 + math.e), abs=1e-3)
    assert winner.pair.prompt_ids == (5, 6) and winner.pair.sft_ids == (*encode(texts[2]), END)
    (alone,) = choose_winners(scored(texts, [2.0, -1.0, -1.0, -1.0], 1))
    assert alone.row == 0 and alone.agreement == pytest.approx(math.e**3 / (math.e**3 + 3))


def test_the_share_of_prompts_that_agree_most():
    texts = ["Final Answer: 1", "Final Answer: 2"] + ["Final Answer: 3"] * 2 + ["no idea"] * 2
    candidates = scored(texts, [-1.0] * 6, 3)
    everyone = choose_winners(candidates)
    assert [(w.row, w.agreement) for w in everyone] == [(0, pytest.approx(0.5)), (2, pytest.approx(1.0))]
    assert [w.row for w in choose_winners(candidates, 0.5)] == [2]
    assert agreement_of(everyone) == pytest.approx(0.75) and math.isnan(agreement_of([]))


def test_a_share_is_taken_as_it_is_written():
    """0.28 of 25 is 7; in floating point 0.28 * 25 lies above it."""
    candidates = scored(["Final Answer: 1"] * 25, [0.0] * 25, 25)
    assert len(choose_winners(candidates, 0.28)) == 7 and len(choose_winners(candidates, 0.281)) == 8


def test_what_was_cut_off_has_no_answer():
    assert choose_winners(scored(["Final Answer: 1", "Final Answer: 1"], [-1.0, -2.0], 1, ended=False)) == []


def test_the_mean_of_the_weights():
    model = tiny_model()
    start = StartingPolicy(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    start.average_into_model(0.25)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] + 0.75)
    with pytest.raises(ValueError, match="share"):
        start.average_into_model(1.5)


def test_the_mean_with_an_untouched_adapter():
    """Half of what the adapter adds."""
    model = add_lora(tiny_model(), Lora(use_peft=True, lora_r=2))
    start = StartingPolicy(model)
    ids = torch.tensor([[5, 6, 7]])
    plain = model(ids).logits
    module = next(m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "get_delta_weight"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    whole = module.get_delta_weight("default").clone()
    start.average_into_model()
    torch.testing.assert_close(module.get_delta_weight("default"), whole / 2)
    assert not torch.allclose(model(ids).logits, plain)
