"""Fused kernels for language-model trainers: per-token log-probs and entropies, entropy scores, group advantages and
the SEGA loss (GEM, arXiv 2511.13007), without a second tensor of the size of the logits.

    token_stats            logits -> log-prob and entropy of each token, both differentiable
    entropy_scores         entropies -> score of each completion
    completion_features    entropies and log-probs -> nine features of each completion, for a `LinearScore`
    group_advantages       scores -> advantages within each prompt's group
    answer_start           where each completion's final answer begins, from a marker's token ids (or, with
                           answer_start_from_offsets, from character offsets)
    fused_entropy_score    the three in one
    sega_loss              logits -> the SEGA loss
    read_score_file        the score.json of `gem calibrate` -> its `LinearScore`

and from hidden states, where the logits never exist whole:

    linear_token_stats, fused_linear_entropy_score, fused_linear_sega_loss
    fused_linear_policy_loss    any loss of (logprob, entropy), gradients in one shot

Importing this looks at no device, compiles nothing and needs torch alone; Triton is imported when a kernel runs.
"""

from .answers import answer_start, answer_start_from_offsets
from .linear.policy_loss import fused_linear_policy_loss
from .linear.sega_loss import fused_linear_sega_loss
from .linear.stats import fused_linear_entropy_score, linear_token_stats
from .logit_stats import token_stats
from .losses import sega_loss
from .score_file import ScoreFile, read_score_file
from .scores import completion_features, entropy_scores, fused_entropy_score, group_advantages, num_fork_tokens
from .types import (
    CompletionFeatures,
    EntropyScoreOutput,
    EntropyScores,
    LinearScore,
    PolicyLossOutput,
    SegaOutput,
    TokenStats,
    VocabParallel,
)

__all__ = [
    "CompletionFeatures",
    "EntropyScoreOutput",
    "EntropyScores",
    "LinearScore",
    "PolicyLossOutput",
    "ScoreFile",
    "SegaOutput",
    "TokenStats",
    "VocabParallel",
    "answer_start",
    "answer_start_from_offsets",
    "completion_features",
    "entropy_scores",
    "fused_entropy_score",
    "fused_linear_entropy_score",
    "fused_linear_policy_loss",
    "fused_linear_sega_loss",
    "group_advantages",
    "linear_token_stats",
    "num_fork_tokens",
    "read_score_file",
    "sega_loss",
    "token_stats",
]
