"""The fit to pairs: known weights come back, nothing leaks into what is held out, verdicts say what the data is."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit

from gem.calibration import fit
from gem.calibration.features import DEFAULT_FEATURES, FEATURES, linear_score, plain_scores
from gem.calibration.fit import calibrate
from gem.calibration.score_file import Verdict
from gem.calibration.verdict import MIN_HELD_OUT, TRAINED_ON, PairFeatures, pair_accuracy, verdict_on_others
from gem.errors import UserError
from gem.statistics import Estimate, wilson_interval

LENGTH = FEATURES.index("length")
COLUMNS = [FEATURES.index(name) for name in DEFAULT_FEATURES]


def noise(n, seed=0):
    """Features of chosen and rejected answers that say nothing of which is better."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 9)) * [1, 2, 1, 1, 3, 0.5, 40, 2, 30], rng.normal(size=(n, 9)) * [
        *(1, 2, 1, 1, 3, 0.5, 40, 2, 30)
    ]


def signal(n, weights, seed=0):
    """Pairs of which the better one is drawn with probability sigma(weights . difference of the default features)."""
    one, other = noise(n, seed)
    wins = np.random.default_rng(seed + 1000).random(n) < expit((one - other)[:, COLUMNS] @ weights)
    return np.where(wins[:, None], one, other), np.where(wins[:, None], other, one)


TRUE = np.array([-1.0, 0.25, 0.0, 2.0])


@pytest.fixture(scope="module")
def fitted():
    return calibrate(*signal(800, TRUE), range(800))


def test_known_weights_come_back(fitted):
    assert fitted.features == DEFAULT_FEATURES and fitted.num_prompts == 800
    found = fitted.weights / fitted.scales
    low, high = (fitted.weight_intervals / fitted.scales[:, None]).T
    assert (low < found).all() and (found < high).all() and (high - low < 0.8).all()
    assert (np.abs(found - TRUE) < high - low).all()  # four standard errors
    assert fitted.verdict.kind == "informative"


def test_an_interval_of_a_weight_is_the_normal_one(fitted):
    """At n = 800 the bootstrap agrees with the inverse of the curvature."""
    better, worse = signal(800, TRUE)
    scaled = (better - worse)[:, COLUMNS] / fitted.scales
    p = expit(scaled @ fitted.weights)
    error = np.sqrt(np.diag(np.linalg.inv((scaled * (p * (1 - p))[:, None]).T @ scaled + fitted.l2 * np.eye(4))))
    np.testing.assert_allclose(np.diff(fitted.weight_intervals)[:, 0], 2 * 1.96 * error, rtol=0.15)


def test_two_pairs_by_hand():
    """d = 3 and 4 of one feature: s = sqrt(12.5), d/s = 0.8485 and 1.1314; l2 = 1, for there are few prompts.

    w = sum of x_i sigma(-x_i w):  0.8485 * 0.3485 + 1.1314 * 0.3028 = 0.6383 at w = 0.7373, so the root is below:
    0.8485 * 0.3608 + 1.1314 * 0.3180 = 0.6659 at w = 0.6741; at 0.6695 both sides are 0.6695 within 0.005.
    """
    better, worse = np.zeros((2, 9)), np.zeros((2, 9))
    better[:, 5] = 3, 4
    fitted = calibrate(better, worse, "ab", features=["mean_logprob"])
    x = np.array([3, 4]) / math.sqrt(12.5)
    assert fitted.l2 == 1.0 and fitted.scales[0] == pytest.approx(math.sqrt(12.5), rel=1e-12)
    assert fitted.weights[0] == pytest.approx(0.6695, abs=0.005)
    assert fitted.weights[0] == pytest.approx(float(x @ expit(-x * fitted.weights[0])), rel=1e-6)
    # Left out, each pair is judged by the other: x = 1 there, w = sigma(-w) = 0.401058, and the margin is d * w / s.
    np.testing.assert_allclose(fitted.held_out, [3 * 0.401058 / 4, 4 * 0.401058 / 3], rtol=1e-5)
    assert fitted.pair_accuracy["calibrated"].value == 1.0
    assert fitted.verdict.kind == "not_informative" and "2 prompts are too few" in fitted.verdict.words


@pytest.mark.parametrize("l2", [0.1, 1.0, 100.0])
def test_the_written_fit_the_refits_and_a_plain_minimiser_agree(l2):
    rng = np.random.default_rng(3)
    d = rng.normal(size=(40, 4)) + np.array([2.0, 0.0, -1.0, 0.5])
    d[0] *= 20  # an outlier

    def loss(w):
        return np.logaddexp(0, -d @ w).sum() + l2 / 2 * w @ w

    truth = minimize(loss, np.zeros(4), tol=1e-14, options={"gtol": 1e-9}).x
    refit = fit._refit(d, np.ones((1, 40)), np.ones((1, 4)), np.array([l2]))[0]
    np.testing.assert_allclose(fit._fit(d, l2, np.ones(40)), truth, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(refit, truth, rtol=1e-5, atol=1e-5)
    # Counts are copies of rows, and a scale is a division of the differences.
    counts = rng.integers(0, 3, 40).astype(float)
    scales = np.array([1.0, 2.0, 0.5, 4.0])
    copies = np.repeat(d, counts.astype(int), axis=0) / scales
    refit = fit._refit(d, counts[None], scales[None], np.array([l2]))[0]
    np.testing.assert_allclose(refit, fit._fit(copies, l2, np.ones(len(copies))), rtol=1e-5, atol=1e-5)


def test_the_held_out_margin_of_a_prompt_is_that_of_a_fit_without_it():
    """Three pairs a prompt stay together; scales, strength and weights are those of `calibrate` on the rest."""
    better, worse = signal(36, np.array([-1.0, 0.0, 0.0, 2.0]), seed=2)
    prompts = np.arange(36) // 3
    fitted = calibrate(better, worse, prompts)
    for prompt in (0, 5, 11):
        rest = prompts != prompt
        other = calibrate(better[rest], worse[rest], prompts[rest])
        expected = (better - worse)[~rest][:, COLUMNS] @ (other.weights / other.scales)
        np.testing.assert_allclose(fitted.held_out[~rest], expected, rtol=1e-5, atol=1e-6)


def held_out_margins(differences, sizes, groups):
    weights = fit._held_out_weights(differences, sizes, groups, np.ones(len(groups)), None)
    return (differences * weights).sum(1)


def test_nothing_leaks_into_the_held_out_accuracy():
    """Noise at N = 40: held out one half over many seeds, in sample well above; and the verdict is rarely wrong."""
    held_out, in_sample, informative = [], [], 0
    for seed in range(60):
        better, worse = noise(40, seed)
        d = (better - worse)[:, COLUMNS]
        sizes = np.maximum(np.abs(better), np.abs(worse))[:, COLUMNS]
        found = pair_accuracy(held_out_margins(d, sizes, np.arange(40)), range(40))
        held_out.append(found.value)
        informative += found.low > 0.5
        in_sample.append(pair_accuracy(d @ fit._fit(d / d.std(0), 1.0, np.ones(40)), range(40)).value)
    assert np.mean(held_out) == pytest.approx(0.5, abs=0.05)  # its error over 60 seeds is 0.014
    assert np.mean(in_sample) > 0.57
    assert informative <= 10  # about 1 in 20 is expected of a 95 % interval


def held_out_accuracy(better, worse, prompts):
    sizes = np.maximum(np.abs(better), np.abs(worse))[:, COLUMNS]
    margins = held_out_margins((better - worse)[:, COLUMNS], sizes, np.asarray(prompts))
    return float((margins > 0).mean())


def test_pairs_of_a_prompt_do_not_vouch_for_each_other():
    """Noise, each pair ten times under one prompt: were pairs left out alone, their copies would give them away."""
    together, apart = [], []
    for seed in range(20):
        pairs = [x.repeat(10, 0) for x in noise(12, seed)]
        together.append(held_out_accuracy(*pairs, np.repeat(np.arange(12), 10)))
        apart.append(held_out_accuracy(*pairs, np.arange(120)))
    assert np.mean(together) == pytest.approx(0.5, abs=0.13)  # its error over 20 seeds is 0.045
    assert np.mean(apart) > 0.65


def test_shuffled_labels_are_not_informative():
    better, worse = signal(60, np.array([-1.0, 0.0, 0.0, 4.0]), seed=4)
    assert calibrate(better, worse, range(60)).verdict.kind == "informative"
    kinds = []
    for seed in range(10):
        swap = np.random.default_rng(seed).random((60, 1)) < 0.5
        verdict = calibrate(np.where(swap, worse, better), np.where(swap, better, worse), range(60)).verdict
        kinds.append(verdict.kind)
        assert "of 60 pairs" in verdict.words and "[" in verdict.words
    assert kinds.count("not_informative") >= 8


@pytest.mark.parametrize("longer", [True, False])
def test_length_alone_is_called_length(longer):
    """The better answer is the longer (shorter) one, and the mean log-prob follows the length with some noise."""
    better, worse = noise(80, 5)
    rng = np.random.default_rng(6)
    short, long = rng.uniform(10, 40, 80), rng.uniform(45, 90, 80)
    better[:, LENGTH], worse[:, LENGTH] = (long, short) if longer else (short, long)
    for side in (better, worse):
        side[:, FEATURES.index("mean_logprob")] = -side[:, LENGTH] / 50 + 0.1 * rng.normal(size=80)
    fitted = calibrate(better, worse, range(80))
    assert fitted.pair_accuracy["length"].value == float(longer)
    assert fitted.pair_accuracy["-length"].value == float(not longer)
    assert fitted.pair_accuracy["calibrated"].value > 0.9
    assert fitted.verdict.kind == "explained_by_length"
    assert ("longer is better" if longer else "shorter is better") in fitted.verdict.words


def test_more_than_length_is_informative():
    """Length helps a little (0.65), the log-prob much more."""
    better, worse = signal(120, np.array([0.0, 0.0, 0.0, 6.0]), seed=7)
    longer = np.random.default_rng(8).random(120) < 0.65
    better[:, LENGTH], worse[:, LENGTH] = np.where(longer, 50, 30), np.where(longer, 30, 50)
    fitted = calibrate(better, worse, range(120))
    assert fitted.pair_accuracy["length"].low > 0.5
    assert fitted.verdict.kind == "informative" and "strong" in fitted.verdict.words


def test_weak_is_called_weak():
    better, worse = signal(1200, np.array([0.0, 0.0, 0.0, 0.8]), seed=1)
    fitted = calibrate(better, worse, range(1200))
    value = fitted.pair_accuracy["calibrated"].value
    assert 0.53 < value < 0.65 and "Informative, weak." in fitted.verdict.words
    assert f"{value:.2f} [" in fitted.verdict.words and "1200 pairs" in fitted.verdict.words


def test_every_score_alone_by_its_sign():
    better, worse = np.full((9, 9), 2.0), np.full((9, 9), 1.0)
    better[8] = worse[8]  # a tie in all
    accuracy = calibrate(better, worse, range(9), fork_weight=-1.0).pair_accuracy
    up, down = 8.5 / 9, 0.5 / 9
    expected = dict.fromkeys(["mean_logprob", "sum_logprob", "min_logprob", "length"], up)
    for name in ("final_entropy", "fork_entropy", "reasoning_entropy", "mean_entropy", "max_entropy", "length"):
        expected[f"-{name}"] = down
    expected |= {"paper": down, "calibrated": up}  # paper with lambda -1: both terms point down
    assert {name: value.value for name, value in accuracy.items()} == pytest.approx(expected)
    assert (accuracy["length"].low, accuracy["length"].high) == pytest.approx(wilson_interval(8.5, 9))
    assert plain_scores(better, 3.0)["paper"][0] == -2.0 + 3 * 2.0


def test_agreement_of_all_pairs_keeps_a_width():
    """Three prompts of ten pairs each: certain as three cases are, not as thirty, and not without doubt."""
    found = pair_accuracy(np.ones(30), [i // 10 for i in range(30)])
    assert found.value == 1.0 and (found.low, found.high) == pytest.approx(wilson_interval(3, 3))


def test_the_same_input_gives_the_same_result():
    better, worse = signal(48, np.array([-1.0, 0.0, 0.0, 2.0]), seed=9)
    one = calibrate(better, worse, range(48))
    other = calibrate(torch.tensor(better), torch.tensor(worse), [f"prompt {i}" for i in range(48)])
    assert (one.weights == other.weights).all() and (one.weight_intervals == other.weight_intervals).all()
    assert (one.held_out == other.held_out).all() and one.pair_accuracy == other.pair_accuracy
    assert one.verdict == other.verdict and one.l2 == other.l2


def test_the_scale_of_a_feature_changes_nothing():
    better, worse = signal(48, np.array([-1.0, 0.0, 0.0, 2.0]), seed=9)
    units = np.ones(9)
    units[COLUMNS] = 1000.0, 1e-3, 0.1, 7.0
    one, other = calibrate(better, worse, range(48)), calibrate(better * units, worse * units, range(48))
    np.testing.assert_allclose(other.weights, one.weights, rtol=1e-6)
    np.testing.assert_allclose(other.scales, one.scales * units[COLUMNS], rtol=1e-12)
    np.testing.assert_allclose(other.held_out, one.held_out, rtol=1e-6)


def test_the_margin_is_a_difference_of_linear_scores():
    better, worse = signal(30, np.array([-1.0, 0.0, 0.0, 2.0]), seed=9)
    fitted = calibrate(better, worse, range(30))
    names, weights = fitted.score(model="m", pairs_hash="h").linear
    scores = linear_score(better, names, weights) - linear_score(worse, names, weights)
    expected = (better - worse)[:, COLUMNS] / fitted.scales @ fitted.weights
    np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rounding", [0.0, 1e-8])
def test_a_feature_without_differences_has_no_weight(rounding):
    """Also where it differs by what fp32 rounds; held out as well."""
    better, worse = signal(30, np.array([-1.0, 0.0, 0.0, 3.0]), seed=9)
    better[:, 1] = worse[:, 1] = 0.7
    better[:, 1] += rounding * np.random.default_rng(0).normal(size=30)
    fitted = calibrate(better, worse, range(30))
    assert fitted.weights[1] == 0 and fitted.scales[1] == 1 and (fitted.weight_intervals[1] == 0).all()
    without = calibrate(better, worse, range(30), features=["final_entropy", "mean_entropy", "mean_logprob"])
    np.testing.assert_allclose(fitted.weights[[0, 2, 3]], without.weights, rtol=1e-6)
    np.testing.assert_allclose(fitted.held_out, without.held_out, rtol=1e-6)


def test_equal_answers_say_nothing():
    same, _ = noise(20)
    fitted = calibrate(same, same, range(20))
    assert (fitted.weights == 0).all() and fitted.pair_accuracy["calibrated"].value == 0.5
    assert fitted.verdict.kind == "not_informative" and math.isfinite(fitted.pair_accuracy["calibrated"].low)


def test_many_pairs_are_left_out_in_groups(monkeypatch):
    better, worse = signal(60, np.array([-1.0, 0.0, 0.0, 3.0]), seed=3)
    alone = calibrate(better, worse, range(60)).held_out
    monkeypatch.setattr(fit, "MAX_HELD_OUT", 60 * 12)
    grouped = calibrate(better, worse, range(60)).held_out
    assert not np.allclose(alone, grouped) and np.corrcoef(alone, grouped)[0, 1] > 0.97


def test_strength_follows_the_data():
    better, worse = noise(60, 1)
    weak = calibrate(better, worse, range(60)).l2
    strong = calibrate(*signal(60, np.array([-6.0, 0.0, 0.0, 20.0])), range(60)).l2
    assert weak >= 10 and strong <= 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_value_that_is_not_finite_names_its_pair(bad, side):
    sides = dict(zip(("chosen", "rejected"), noise(12)))
    sides[side][7, 8] = bad  # not among the default features: it is reported alone as well
    with pytest.raises(UserError, match=rf"length of the {side} answer of pair 7 .* is {bad}, expected a finite") as e:
        calibrate(sides["chosen"], sides["rejected"], range(12))
    assert "\n" not in str(e.value)


def test_refusals():
    better, worse = noise(6)
    with pytest.raises(UserError, match="at least 2 prompts, got 1"):
        calibrate(better, worse, ["a"] * 6)
    with pytest.raises(UserError, match="at least 2 prompts, got 0"):
        calibrate(better[:0], worse[:0], [])
    with pytest.raises(UserError, match=r"got \[6, 9\], \[5, 9\] and 6"):
        calibrate(better, worse[:5], range(6))
    with pytest.raises(UserError, match=r"got \[6, 9\], \[6, 9\] and 5"):
        calibrate(better, worse, range(5))
    with pytest.raises(UserError, match=r"chosen: expected the 9 features .* got \[6, 3\]"):
        calibrate(better[:, :3], worse, range(6))
    with pytest.raises(UserError, match="'entropy' is unknown; choose from final_entropy, "):
        calibrate(better, worse, range(6), features=["entropy"])
    for names in ([], ["length", "length"]):
        with pytest.raises(UserError, match="one or more different names"):
            calibrate(better, worse, range(6), features=names)


LOGPROB = FEATURES.index("mean_logprob")
SEEN = Verdict(kind="informative", words="Informative, strong. It prefers the better answer in 0.92 of 48 pairs.")


@pytest.mark.parametrize(
    ("held_out", "kind", "words"),
    [
        (Estimate(0.56, 0.39, 0.72, 32), "not_informative", "Not informative: the interval holds 0.5. It prefers"),
        (Estimate(0.30, 0.16, 0.48, 32), "not_informative", "Not informative: worse than chance. It prefers"),
        (Estimate(0.61, 0.55, 0.66, 300), "informative", "Informative, weak. It prefers the better answer in 0.61 ["),
        (Estimate(0.72, 0.54, 0.85, 32), "informative", "Informative, moderate. It prefers"),
        (Estimate(0.94, 0.80, 0.98, 32), "informative", "Informative, strong. It prefers"),
    ],
)
def test_pairs_that_sft_has_not_seen_decide(held_out, kind, words):
    found = verdict_on_others(SEEN, held_out, TRAINED_ON)
    assert found.kind == kind and found.words.startswith(words)
    assert f"of {held_out.count} held-out pairs" in found.words
    assert (
        "whose chosen answers SFT has trained on: informative, strong. It prefers the better answer in 0.92"
        in found.words
    )


@pytest.mark.parametrize("held_out", [None, Estimate(0.4, 0.2, 0.6, MIN_HELD_OUT - 1)])
def test_too_few_pairs_that_sft_has_not_seen_decide_nothing_and_are_asked_for(held_out):
    found = verdict_on_others(SEEN, held_out, TRAINED_ON)
    assert found.kind == "informative" and found.words.startswith(SEEN.words)
    assert "These are pairs whose chosen answers SFT has trained on" in found.words
    assert f"this may be too high; an eval_file of at least {MIN_HELD_OUT} other pairs would tell" in found.words


def test_held_out_pairs_make_no_verdict_better():
    worse = Verdict(kind="explained_by_length", words="Explained by length.")
    assert verdict_on_others(worse, Estimate(0.94, 0.80, 0.98, 32), TRAINED_ON) == worse


def own_and_others(own_gap, other_gap, num_own=12, num_others=20, seed=3):
    """Pairs whose mean log-prob tells better from worse by so much: the model's own ones, and others."""
    draw = np.random.default_rng(seed)

    def pairs(number, gap, name):
        better, worse = draw.normal(size=(2, number, 9))
        better[:, LOGPROB] += gap
        better[:, FEATURES.index("length")] = worse[:, FEATURES.index("length")] = 5.0
        return PairFeatures(better, worse, [(name, i) for i in range(number)])

    return pairs(num_own, own_gap, "own"), pairs(num_others, other_gap, "other")


def fitted_to_own(own, others):
    names = ["mean_logprob", "fork_entropy"]
    return calibrate(own.chosen, own.rejected, own.prompts, given=others, features=names, scales=np.ones(9))


def test_after_sft_given_pairs_say_nothing_of_a_score_fitted_to_own_answers():
    """Given pairs that are told apart made noise "informative"; held-out pairs and own answers decide."""
    drawn = (own_and_others(0.0, 9.0, num_own=16, num_others=48, seed=seed) for seed in range(40))
    fits = ((fitted_to_own(own, others), others) for own, others in drawn)
    fitted, clear = next(
        (fit, others)
        for fit, others in fits
        if fit.verdict.kind == "informative" and pair_accuracy(fit.held_out, fit.prompts).low <= 0.5
    )
    assert "(16 of them a right and a wrong" in fitted.verdict.words
    alone = fitted.verdict_after_sft(None)
    assert alone.kind == "not_informative" and "16 pairs that neither it nor SFT was fitted to" in alone.words
    _, level = own_and_others(0.0, 0.0, num_others=32, seed=5)
    assert fitted.verdict_after_sft(level).kind == "not_informative"
    good, other = own_and_others(4.0, 4.0)
    found = fitted_to_own(good, clear).verdict_after_sft(other)
    assert (
        found.kind == "informative" and "32 pairs that neither" in found.words and "Of its own alone: " in found.words
    )


def test_a_score_that_is_wrong_of_own_answers_is_not_informative_whatever_others_say():
    noise, clear = next(
        (own, others)
        for own, others in (own_and_others(0.0, 9.0, num_others=200, seed=seed) for seed in range(20))
        if pair_accuracy(fitted_to_own(own, others).held_out, own.prompts).value <= 0.5
        and pair_accuracy(others.chosen[:, LOGPROB] - others.rejected[:, LOGPROB], others.prompts).low > 0.9
        and fitted_to_own(own, others).weights[0] > 0
    )
    found = fitted_to_own(noise, clear)
    assert found.pair_accuracy["calibrated"].low > 0.5
    assert found.verdict.kind == "not_informative"
    assert found.verdict.words.startswith("Not informative: of the model's own answers it prefers no better ones. ")


def test_a_pair_of_others_that_is_not_finite_is_named():
    own, others = own_and_others(1.0, 1.0)
    others.rejected[4, LOGPROB] = -np.inf
    with pytest.raises(UserError, match="mean_logprob of the rejected answer of pair 4"):
        fitted_to_own(own, others)


def test_of_eight_prompts_the_score_that_is_tested_has_its_strength_chosen_too():
    """Noise asks for the strongest ridge; of seven prompts DEFAULT_STRENGTH was taken, and other scores were tested."""
    strengths = []
    for seed in range(6):
        noise, _ = own_and_others(0.0, 0.0, num_own=8, seed=seed)
        fitted = calibrate(noise.chosen, noise.rejected, noise.prompts, features=["mean_logprob", "fork_entropy"])
        strengths.append(fitted.l2)
        if fitted.l2 == 1000.0:
            assert np.median(np.abs(fitted.held_out_weights * fitted.scales)) < 0.05
    assert 1000.0 in strengths
