"""`gem calibrate`: from a file of pairs to a score and what is known of its worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from gem.calibration.features import feature_columns
from gem.calibration.measure import (
    PromptIds,
    calibrate_policy,
    candidate_scores,
    known_answers,
    measure_samples,
    own_candidates,
    pair_features,
    pairs_hash,
    prompts_to_sample,
    right_and_wrong,
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


@dataclass(frozen=True)
class CalibrateRequest:
    """What `gem calibrate` was asked for. sample: candidates a prompt, 0: none; `sampling` says how they are drawn."""

    model: str
    pairs: Source
    split: str
    eval_file: Source | None
    features: tuple[str, ...]
    fit_to: str  # auto, pairs or candidates
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

    With `sample`, candidates of `prompts_to_sample` give the scales and, where answers are known, right and wrong
    candidates to fit to. It is measured on the candidates of `eval_file`'s prompts, all of them, or, without one, on
    the same candidates, those of each prompt by a score fitted without that prompt.
    """
    feature_columns(request.features)
    if request.eval_file is not None and not request.sample:
        raise UserError("--eval-file: expected --sample of at least 1 with it, got 0: the score is tested on samples")
    if request.fit_to == "candidates" and request.sample < 2:
        raise UserError(
            f"--calibrate-on candidates: expected --sample of at least 2 with it, got {request.sample}: a right and a "
            "wrong answer are told apart"
        )
    for source in filter(None, (request.pairs, request.eval_file)):
        check_source(source)
    room = request.sampling.max_completion_length if request.sample else 0
    pairs = _load(request.pairs, request, form, context, room, console)
    others = None if request.eval_file is None else _load(request.eval_file, request, form, context, room, console)
    if others is not None and all(pair.answer is None for pair in others):
        raise UserError(
            f"{request.eval_file}: no row has a known answer, so right and wrong samples cannot be told apart; add "
            f'"{request.rows.answer_column}", or leave it out: --eval-file (held_out in Python)'
        )
    prompts = prompts_to_sample(pairs)
    tested = {} if others is None else known_answers(others)
    policy, form = load()
    with progress(console, "Calibration", len(pairs) + (len(prompts) + len(tested)) * bool(request.sample)) as bar:
        given = pair_features(policy, form, pairs, request.scoring, batch_size=request.batch_size, bar=bar)
        pool = _sample(policy, form, list(prompts), request, bar, step=0)
        fitted = calibrate_policy(
            given, pool, None if pool is None else right_and_wrong(pool, list(prompts), list(prompts.values())),
            features=request.features, fit_to=request.fit_to, fork_weight=request.scoring.fork_weight,
            seed=request.seed,
        )  # fmt: skip
        candidates = _sample(policy, form, list(tested), request, bar, step=1) if others is not None else pool
        truths = tested if others is not None else prompts
        samples = platt = None
        if candidates is not None:
            # A prompt that was fitted on is judged by the score fitted without it, wherever it stands.
            scores = candidate_scores(fitted, list(truths), candidates)
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


def _sample(
    policy: Policy, form: TextFormat, prompts: list[PromptIds], request: CalibrateRequest, bar: Bar, *, step: int
) -> ScoredRollout | None:
    if not request.sample:
        return None
    return own_candidates(
        policy, form, prompts, request.scoring, request.sampling, seed=request.seed, step=step,
        batch_size=request.batch_size, bar=bar,
    )  # fmt: skip
