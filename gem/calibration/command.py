"""`gem calibrate`: from a file of pairs to a score and what is known of its worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console

from gem.calibration.features import feature_columns
from gem.calibration.measure import (
    SCALE_PROMPTS,
    PromptIds,
    calibrate_policy,
    candidate_scores,
    measure_samples,
    own_candidates,
    pair_features,
    pairs_hash,
)
from gem.calibration.score_file import Score
from gem.config.settings import RowSettings, Sampling, Scoring
from gem.data.batches import TokenizedPair
from gem.data.pairs import load_pairs
from gem.data.prompts import TextFormat
from gem.data.sources import Source, check_source
from gem.errors import UserError
from gem.model.forward import Policy
from gem.progress import Bar, progress
from gem.scoring.score import ScoredRollout
from gem.terminal.console import print_warning

# Of the pairs' own prompts at most so many get candidates to measure the score on: more takes longer and tells little
# more. A file given to test on is used whole.
MOST_PROMPTS = 64


@dataclass(frozen=True)
class CalibrateRequest:
    """What `gem calibrate` was asked for. sample: candidates a prompt, 0: none; `sampling` says how they are drawn."""

    model: str
    pairs: Source
    split: str
    eval_file: Source | None
    features: tuple[str, ...]
    sample: int
    rows: RowSettings
    sampling: Sampling
    scoring: Scoring
    batch_size: int
    seed: int


def calibrate_file(
    request: CalibrateRequest,
    form: TextFormat,
    context: int | None,
    load: Callable[[], tuple[Policy, TextFormat]],
    console: Console,
) -> Score:
    """The score of a file of pairs. Everything that can be wrong with the input is found before `load` is called.

    With `sample`, candidates of at most `SCALE_PROMPTS` of the pairs' prompts give the scales. It is measured on the
    candidates of `eval_file`'s prompts or, without one, of at most `MOST_PROMPTS` of the pairs' own whose answer is
    known, each judged by a score fitted without the pairs of its prompt.
    """
    feature_columns(request.features)
    if request.eval_file is not None and not request.sample:
        raise UserError("--eval-file: expected --sample of at least 1 with it, got 0: the score is tested on samples")
    for source in filter(None, (request.pairs, request.eval_file)):
        check_source(source)
    room = request.sampling.max_completion_length if request.sample else 0
    pairs = _load(request.pairs, request, form, context, room, console)
    others = None if request.eval_file is None else _load(request.eval_file, request, form, context, room, console)
    if others is not None and all(pair.answer is None for pair in others):
        raise UserError(
            f"{request.eval_file}: no row has a known answer, so right and wrong samples cannot be told apart; add "
            f'"{request.rows.answer_column}", or leave out --eval-file'
        )
    prompts = _prompts(pairs, [] if others is not None else pairs)
    tested = {} if others is None else _truths(others)
    policy, form = load()
    with progress(console, "Calibration", len(pairs) + (len(prompts) + len(tested)) * bool(request.sample)) as bar:
        given = pair_features(policy, form, pairs, request.scoring, batch_size=request.batch_size, bar=bar)
        pool = _sample(policy, form, list(prompts), request, bar, step=0)
        fitted = calibrate_policy(
            given, pool, features=request.features, fork_weight=request.scoring.fork_weight, seed=request.seed
        )
        candidates = _sample(policy, form, list(tested), request, bar, step=1) if others is not None else pool
        truths = tested if others is not None else prompts
        samples = platt = None
        if candidates is not None:
            # A prompt with pairs is judged by the score fitted without them, wherever it stands.
            scores = candidate_scores(fitted, given, list(truths), candidates)
            samples, platt = measure_samples(
                scores, candidates, list(truths.values()), fork_weight=request.scoring.fork_weight, seed=request.seed
            )
    return fitted.score(
        model=request.model, pairs_hash=pairs_hash(pairs), top_m=request.scoring.top_m, platt=platt, samples=samples
    )


def _load(
    source: Source, request: CalibrateRequest, form: TextFormat, context: int | None, room: int, console: Console
) -> list[TokenizedPair]:
    pairs, report = load_pairs(source, form, context, request.rows, request.split, room=room)
    if str(report):
        print_warning(console, str(report))
    return pairs


def _truths(pairs: Sequence[TokenizedPair]) -> dict[PromptIds, str | None]:
    """Each prompt once, with its known answer: the first that a row gives."""
    found: dict[PromptIds, str | None] = {}
    for pair in pairs:
        if found.get(pair.prompt_ids) is None:
            found[pair.prompt_ids] = pair.answer
    return found


def _prompts(pairs: Sequence[TokenizedPair], measured: Sequence[TokenizedPair]) -> dict[PromptIds, str | None]:
    """The prompts that get candidates: `MOST_PROMPTS` of those measured on, else `SCALE_PROMPTS` for the scales."""
    known = {prompt: answer for prompt, answer in _truths(measured).items() if answer is not None}
    if known:
        return dict(list(known.items())[:MOST_PROMPTS])
    return dict(list(_truths(pairs).items())[:SCALE_PROMPTS])


def _sample(
    policy: Policy, form: TextFormat, prompts: list[PromptIds], request: CalibrateRequest, bar: Bar, *, step: int
) -> ScoredRollout | None:
    if not request.sample:
        return None
    return own_candidates(
        policy, form, prompts, request.scoring, request.sampling, seed=request.seed, step=step,
        batch_size=request.batch_size, bar=bar,
    )  # fmt: skip
