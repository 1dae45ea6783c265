"""What is no mistake of a row, but seldom meant: said in a line, never refused."""

from __future__ import annotations

from collections.abc import Sequence

from gem.config.settings import TrainConfig
from gem.data.batches import TokenizedPair


def row_warnings(name: str, pairs: Sequence[TokenizedPair], *, answers_matter: bool = True) -> list[str]:
    """Of one source: pairs that stand there both ways round; known answers that are nowhere."""
    found = []
    there = {(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs}
    turned = sum((prompt, rejected, chosen) in there for prompt, chosen, rejected in there) // 2
    if turned:
        found.append(
            f"Warning: {name}: {turned} of {len(there)} pairs stand there the other way round too; one of the two is "
            "wrong, and together they teach nothing: delete one"
        )
    if answers_matter and all(pair.answer is None for pair in pairs):
        found.append(
            f'Warning: {name}: no row has a known answer ("answer"), so right and wrong answers are not counted; '
            "another column is named by --answer-column (answer_column in a file and in Python)"
        )
    return found


def marker_notes(config: TrainConfig, pairs: Sequence[TokenizedPair]) -> list[str]:
    """How many chosen answers SFT learns with a line more than they were given (`gem.data.pairs.sft_target`)."""
    changed = sum(pair.sft_ids != pair.chosen_ids for pair in pairs)
    if not changed or not config.sft_epochs or not config.chain_of_thought:
        return []
    return [
        f"{config.train_file}: {changed} of {len(pairs)} chosen answers have no {config.answer_marker!r}; it is added "
        "to them for SFT; answer_span: last_sentence leaves it off"
    ]


def overlap_warnings(
    train: Sequence[TokenizedPair], held_out: Sequence[TokenizedPair], train_name: str, eval_name: str
) -> list[str]:
    """Where prompts that are evaluated on are trained on."""
    trained = {pair.prompt_ids for pair in train}
    tested = {pair.prompt_ids for pair in held_out}
    if not (both := trained & tested):
        return []
    same = tested == trained and {p.chosen_ids for p in train} == {p.chosen_ids for p in held_out}
    what = "holds the pairs of" if same else f"shares {len(both)} of its {len(tested)} prompts with"
    return [
        f"Warning: {eval_name} {what} {train_name}: what is measured on them is how well they were learned by heart; "
        "take them out of one"
    ]
