"""The settings of SEGA's advantages, as a trainer's configuration gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import arguments
from ..scores import entropy_scores, group_advantages
from ..types import EntropyScores


@dataclass(frozen=True)
class Sega:
    """`entropy_scores` and `group_advantages` say what they mean."""

    fork_weight: float = 1.0
    top_m: float | int = 0.1
    no_answer: str = "tail"
    mapping: str = "identity"
    scale: str = "none"
    marker: Any = None
    """What stands before the final answer: for verl a text ("####") or several, for slime the ids of its tokens."""

    def scores(self, entropy: Tensor, mask: Tensor, answer_start: Tensor) -> EntropyScores:
        return entropy_scores(
            entropy, completion_mask=mask, answer_start=answer_start, fork_weight=self.fork_weight, top_m=self.top_m,
            no_answer=self.no_answer,
        )  # fmt: skip

    def advantages(self, score: Tensor, valid: Tensor, group_ids: Tensor) -> Tensor:
        return group_advantages(score, valid=valid, mapping=self.mapping, scale=self.scale, group_ids=group_ids)


def settings_of(given: Any, name: str) -> Sega:
    """From a mapping, or None: the defaults. `name` is what the trainer calls it."""
    given = dict(given or {})
    unknown = set(given) - set(Sega.__dataclass_fields__)
    if unknown:
        arguments.fail(name, f"of {', '.join(Sega.__dataclass_fields__)}", ", ".join(sorted(unknown)))
    return Sega(**given)
