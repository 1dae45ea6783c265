"""Fused kernels for language-model trainers: per-token log-probs and entropies, entropy scores, group advantages and
the SEGA loss (GEM, arXiv 2511.13007), without a second tensor of the size of the logits.

    token_stats            logits -> log-prob and entropy of each token, both differentiable
    entropy_scores         entropies -> score of each completion
    group_advantages       scores -> advantages within each prompt's group
    fused_entropy_score    the three in one
    sega_loss              logits -> the SEGA loss

Importing this looks at no device, compiles nothing and needs torch alone; Triton is imported when a kernel runs.
"""

from .losses import sega_loss
from .scores import entropy_scores, fused_entropy_score, group_advantages
from .token_stats import token_stats
from .types import EntropyScoreOutput, EntropyScores, SegaOutput, TokenStats

__all__ = [
    "EntropyScoreOutput",
    "EntropyScores",
    "SegaOutput",
    "TokenStats",
    "entropy_scores",
    "fused_entropy_score",
    "group_advantages",
    "sega_loss",
    "token_stats",
]
