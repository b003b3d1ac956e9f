import numpy as np
import pandas as pd
import pytest

from weightgeom.origins.classifier import Classifier, Gaussians, conformal_quantile, measurements

NAMES = ["x", "y"]


def table(means: dict[str, tuple[float, float]], number: int, seed: int, shift: float = 0.0) -> pd.DataFrame:
    """Unit Gaussians about the means, in 27 settings that each shift `x` by a draw of its own."""
    generator = np.random.default_rng(seed)
    shifts = {place: shift * generator.standard_normal() for place in np.ndindex(3, 3, 3)}
    rows = [
        {
            "label": label,
            **dict(zip(("base", "data", "rate"), map(str, place), strict=True)),
            "x": mean[0] + generator.standard_normal() + shifts[place],
            "y": mean[1] + generator.standard_normal(),
        }
        for label, mean in means.items()
        for place in np.ndindex(3, 3, 3)
        for _ in range(number)
    ]
    return pd.DataFrame(rows)


def judged(classifier: Classifier, x: float, y: float):
    (judgement,) = classifier.judge(pd.DataFrame([{"x": x, "y": y}]))
    return judgement


def test_likelihoods_are_the_posterior_of_two_gaussians() -> None:
    # Means -1 and 1 and unit variance: log-odds at x are 2x. With 5400 draws each the means have sd 0.014,
    # the covariance 0.01, and the log-odds at 1 some 0.05.
    classifier = Classifier.of(table({"a": (-1, 0), "b": (1, 0)}, 200, 0), NAMES)
    for x in (-1.0, 0.0, 0.5, 1.0):
        assert judged(classifier, x, 0.3).likelihoods["b"] == pytest.approx(
            1 / (1 + np.exp(-2 * x)), abs=0.03
        )
    assert classifier.temperature == pytest.approx(1, abs=0.08)


def test_origins_far_apart_have_one_answer_and_equal_ones_none() -> None:
    classifier = Classifier.of(table({"a": (0, 0), "b": (0, 0), "c": (12, 0)}, 20, 1), NAMES)
    far, between = judged(classifier, 12, 0), judged(classifier, 0, 0)
    assert far.answer == "c" and far.fits == ("c",) and far.likelihoods["c"] > 0.99
    assert between.answer is None and between.fits == ("a", "b") and not between.outside


def test_an_update_unlike_all_is_outside_and_has_no_answer() -> None:
    classifier = Classifier.of(table({"a": (0, 0), "b": (12, 0)}, 20, 2), NAMES)
    judgement = judged(classifier, 12, 9)
    # The nearest origin's squared distance exceeds 9.21 for one in a hundred of two dimensions: 9 / 3.03.
    assert (
        judgement.outside
        and judgement.answer is None
        and judgement.distance == pytest.approx(9 / 3.03, rel=0.15)
    )
    assert not judged(classifier, 12, 2).outside


def test_settings_that_shift_the_measurements_soften_the_likelihoods() -> None:
    means = {"a": (-1.5, 0.0), "b": (1.5, 0.0)}
    alike, apart = (Classifier.of(table(means, 20, 3, shift), NAMES) for shift in (0.0, 2.0))
    assert apart.temperature > 1.3 * alike.temperature
    assert judged(apart, 1.0, 0.0).likelihoods["b"] < judged(alike, 1.0, 0.0).likelihoods["b"]


def test_the_quantile_covers_a_new_score_as_often_as_promised() -> None:
    assert conformal_quantile(np.arange(1.0, 10), 0.9) == 9  # ceil(10 * 0.9) = 9
    assert conformal_quantile(np.arange(1.0, 100), 0.9) == 90  # ceil(100 * 0.9) = 90
    assert conformal_quantile(np.arange(1.0, 5), 0.9) == 4  # too few: the largest
    draws = np.random.default_rng(0).exponential(size=(20_000, 20))
    covered = np.mean([conformal_quantile(draw[:19], 0.9) >= draw[19] for draw in draws])
    # 18 of 20 ranks: 0.9, with a standard error of 0.0021.
    assert covered == pytest.approx(0.9, abs=0.0085)


def test_the_set_holds_the_true_origin_of_new_updates_as_often_as_promised() -> None:
    means = {"a": (-1.0, 0.0), "b": (1.0, 0.0), "c": (0.0, 1.5)}
    classifier = Classifier.of(table(means, 40, 4), NAMES)
    new = table(means, 40, 5)
    covered = [
        label in judgement.fits for label, judgement in zip(new["label"], classifier.judge(new), strict=True)
    ]
    # 3240 updates: sd 0.0053, and as much again of the threshold itself; four of them together.
    assert np.mean(covered) == pytest.approx(0.9, abs=0.03)


def test_a_measurement_that_never_differs_is_left_out() -> None:
    known = table({"a": (-1, 0), "b": (1, 0)}, 10, 6).assign(same=3.0)
    with_it, without = Classifier.of(known, [*NAMES, "same"]), Classifier.of(known, NAMES)
    assert with_it.gaussians.scale[2] == 0
    update = pd.DataFrame([{"x": 0.4, "y": 0.0, "same": 7.0}])
    for first, second in zip(with_it.judge(update), without.judge(update), strict=True):
        # The shrinkage sees one more dimension, of variance 0.
        assert first.likelihoods["b"] == pytest.approx(second.likelihoods["b"], abs=0.03)


def test_gaussians_know_their_means_and_the_columns_of_a_place_are_no_measurements() -> None:
    known = table({"b": (5, 0), "a": (0, 0)}, 100, 7)
    fitted = Gaussians.of(known[NAMES].to_numpy(), known["label"].tolist())
    assert fitted.labels == ("a", "b")
    means = fitted.means / fitted.scale
    assert means[1] - means[0] == pytest.approx([5, 0], abs=0.15)
    assert measurements(known.assign(relative_norm=1.0, d_model=32, step=8)) == NAMES


def test_known_updates_of_one_setting_are_refused() -> None:
    known = table({"a": (0, 0), "b": (1, 0)}, 2, 8).assign(base="A", data="style", rate="low")
    with pytest.raises(ValueError, match="no setting can be held out: known updates need two or more values"):
        Classifier.of(known, NAMES)
