from math import sqrt

import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from weightgeom.geometry.subspace import Subspace
from weightgeom.table import arm_columns
from weightgeom.text.prompt_groups import equal_groups
from weightgeom.uncertainty.contrast import (
    Contrast,
    auroc,
    best_of_layers,
    half_samples,
    permuted_aurocs,
    two_sided,
)
from weightgeom.uncertainty.rows import (
    EstimateSettings,
    best_layer_rows,
    boundary_rows,
    output_rows,
    overlap_rows,
    shape_rows,
)

D, VOCABULARY = 16, 40
ARM = arm_columns("u", against="f")
ASKED = EstimateSettings(neighbours=6, points=12, thresholds=[0.1, 0.5], resamples=2, random=19, seed=0)
WEIGHT = torch.randn(VOCABULARY, D, generator=torch.Generator().manual_seed(7)) / 2
# Anisotropic, like states: what is random must be judged against permuted labels and not against a sphere.
SCALES = torch.linspace(3, 0.3, D)
SPACES = {
    "output_top": Subspace(torch.eye(D)[:, :4].double()),
    "output_bottom": Subspace(torch.eye(D)[:, -4:].double()),
}


def head(states):
    return torch.tanh(states) @ WEIGHT.T


def compared(factual, uncertain, permutations=39, seed=0):
    """All rows of a comparison of two groups, cut to one size as the probe does."""
    groups = equal_groups({"factual": list(factual), "uncertain": list(uncertain)}, 100, seed)
    pooled = torch.stack([*groups["factual"], *groups["uncertain"]])
    contrast = Contrast.of(len(groups["factual"]), permutations, seed)
    held = contrast.test[0].flatten()
    return [
        *output_rows(head, pooled[held], contrast.boundaries(pooled), torch.eye(D)[:2], [3, 5], ARM, ASKED),
        *boundary_rows(pooled, contrast, ARM),
        *overlap_rows(pooled, contrast, SPACES, ARM, seed),
        *shape_rows(pooled, contrast, ARM, ASKED),
    ]


@pytest.mark.slow
def test_two_groups_from_one_distribution_of_unequal_size_differ_in_nothing():
    generator, draws, rejected = torch.Generator().manual_seed(0), 100, {}
    for draw in range(draws):
        factual, uncertain = (torch.randn(n, D, generator=generator) * SCALES + 1 for n in (24, 35))
        for row in compared(factual, uncertain, permutations=39, seed=draw):
            # Against random directions an anisotropic cloud does differ; its labels do not matter.
            if row["quantity"].endswith("_p_value") and "_random_" not in row["quantity"]:
                name = row["quantity"], row.get("subspace"), row["arm"]
                rejected[name] = rejected.get(name, 0) + (row["value"] <= 0.05)
    # A Bonferroni bound: 0.1 % of false alarms over all of them.
    most = stats.binom.isf(1e-3 / len(rejected), draws, 0.05)
    assert len(rejected) == 15 and max(rejected.values()) <= most, (most, rejected)


def test_planted_groups_differ_and_the_output_sees_a_boundary_along_its_own_directions(generator):
    factual, uncertain = (torch.randn(60, D, generator=generator) * 0.1 for _ in range(2))
    uncertain = uncertain * torch.cat([torch.ones(4), torch.full((D - 4,), 0.01)])  # of dimension 4
    uncertain[:, 0] += 2  # along the first axis
    arm = ARM["arm"]
    rows = {
        (row["quantity"], row.get("subspace"), row["arm"]): row["value"]
        for row in compared(factual, uncertain)
    }
    assert rows["auroc_projection", None, arm] == rows["auroc_logistic", None, arm] == 1
    assert rows["amplification", None, arm] > 1 and rows["amplification_p_value", None, arm] <= 0.05
    assert rows["mle_dimension_ratio", None, arm] < 0.6
    assert rows["mle_dimension_ratio_p_value", None, arm] <= 0.05
    assert_close(rows["overlap", "output_top", arm], D / 4, rtol=0.05, atol=0)
    assert rows["overlap", "output_bottom", arm] < 0.05
    assert rows["overlap_random_p_value", "output_top", arm] < 1e-3


def test_a_random_direction_has_overlap_1(generator):
    # One direction's share has a sd of √(2 (d - k) / (k (d + 2))) = 1.15; the mean of 2000 has 0.026.
    directions = torch.nn.functional.normalize(torch.randn(2000, D, generator=generator), dim=1)
    for space in SPACES.values():
        fractions = [space.relative_fraction(direction[None]) for direction in directions]
        assert abs(sum(fractions) / len(fractions) - 1) < 5 * sqrt(2 * 12 / (4 * 18) / 2000)


def test_auroc_is_that_of_mann_and_whitney_ties_included(generator):
    low, high = torch.randn(40, generator=generator).round(), torch.randn(30, generator=generator).round() + 1
    measured, reference = auroc(low, high), stats.mannwhitneyu(high, low, method="asymptotic")
    assert_close(measured.value, float(reference.statistic) / 1200, rtol=1e-12, atol=0)
    assert_close(measured.p_value, float(reference.pvalue), rtol=1e-4, atol=1e-9)
    # Two against two, all but one pair in order: 3/4.
    assert auroc(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0])).value == 0.75


def test_the_interval_of_a_perfect_separation_ends_where_newcombes_equation_is_solved():
    measured = auroc(torch.arange(20.0), torch.arange(20.0) + 30)
    # 1 - A = t √V(A), V = A (1 - A) [1 + 19 ((1 - A)/(2 - A) + A/(1 + A))] / 400, t = 2.0244: A = 0.89207.
    area, t = measured.low, float(stats.t.ppf(0.975, 38))
    clusters = 1 + 19 * ((1 - area) / (2 - area) + area / (1 + area))
    assert_close(1 - area, t * sqrt(area * (1 - area) * clusters / 400), rtol=1e-9, atol=0)
    assert_close(area, 0.892070, rtol=0, atol=1e-6)
    assert (measured.value, measured.high) == (1, 1) and measured.stderr > 0.02
    # Mirrored groups have the mirrored interval.
    other = auroc(torch.arange(20.0) + 30, torch.arange(20.0))
    assert_close([other.low, other.high], [0.0, 1 - measured.low], rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("size", [10, 20, 50])
@pytest.mark.parametrize("area", [0.5, 0.75, 0.9, 0.97, 0.995])
def test_the_interval_of_the_auroc_covers_the_truth(size, area, generator):
    draws, shift = 1000, sqrt(2) * float(stats.norm.ppf(area))
    covered = 0
    for _ in range(draws):
        measured = auroc(
            torch.randn(size, generator=generator), torch.randn(size, generator=generator) + shift
        )
        covered += measured.low <= area <= measured.high
    # Binomial: 0.95 within 3.7 of its standard errors, 1e-4 on either side; the areas near 1 take few values,
    # which no interval covers at exactly 95 %: there it covers more.
    least, most = (stats.binom.ppf(p, draws, 0.95) for p in (1e-4, 1 - 1e-4))
    assert covered >= least and (covered <= most or area > 0.8 or size == 10)


def test_the_p_value_of_the_best_layer_is_the_rank_of_its_value_among_all_maxima():
    values = torch.tensor([[0.6, 0.5, 0.7, 0.4], [0.8, 0.9, 0.5, 0.6], [0.5, 0.5, 0.5, 0.5]])
    # Maxima by arrangement: 0.8, 0.9, 0.7, 0.6. Of 0.6: all four; of 0.8: the first two; of 0.5: all.
    assert best_of_layers(values).tolist() == [1.0, 0.5, 1.0]


def test_the_first_of_the_permuted_aurocs_are_those_of_the_rows_and_each_layer_has_its_p_value(generator):
    states = torch.randn(40, 6, generator=generator)
    contrast = Contrast.of(20, 5, 0)
    areas = permuted_aurocs(states, contrast, refits=3)
    value_of = {row["quantity"]: row["value"] for row in boundary_rows(states, contrast, ARM)}
    assert {name: len(values) for name, values in areas.items()} == {"projection": 6, "logistic": 4}
    assert all(float(values[0]) == value_of[f"auroc_{name}"] for name, values in areas.items())
    rows = list(best_layer_rows({2: areas, 5: areas}, ARM))
    assert [(row["layer"], row["quantity"], row["n"]) for row in rows] == [
        (layer, f"auroc_{name}_max_p_value", n) for name, n in (("projection", 5), ("logistic", 3))
        for layer in (2, 5)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_in_the_best_of_32_layers_of_noise_groups_are_told_apart_in_one_case_of_twenty(shared, generator):
    draws, wrong, exceeded = 100, 0, 0
    for draw in range(draws):
        contrast = Contrast.of(24, 39, draw)
        common = torch.randn(48, 8, generator=generator) * shared**0.5
        areas = [
            permuted_aurocs(
                common + torch.randn(48, 8, generator=generator) * (1 - shared) ** 0.5, contrast, refits=0
            )["projection"]
            for _ in range(32)
        ]
        wrong += float(best_of_layers(torch.stack(areas)).min()) <= 0.05
        exceeded += max(auroc_of(float(areas_of_layer[0]), 12) for areas_of_layer in areas) > 0.5
    # 5 % (2 of 40 ranks), within a binomial bound of 1e-4; the best layer's own interval errs far more.
    assert wrong <= stats.binom.ppf(1 - 1e-4, draws, 0.05)
    assert shared or exceeded > draws / 4


def auroc_of(area, size):
    """The lower end of the interval of so large an area of two groups of `size`."""
    wins = round(area * size * size)
    high = torch.tensor([sum(wins > i * size + j for j in range(size)) - 0.5 for i in range(size)])
    return auroc(torch.arange(float(size)), high).low


def test_two_equal_layers_of_separated_groups_are_both_told_apart(generator):
    states = torch.randn(60, 4, generator=generator)
    states[30:] += 4
    areas = permuted_aurocs(states, Contrast.of(30, 39, 0), refits=39)
    for values in areas.values():
        assert best_of_layers(torch.stack([values, values])).tolist() == [1 / 40, 1 / 40]


def test_arrangements_permute_labels_within_each_half():
    contrast = Contrast.of(7, 4, 0)
    for part, pooled in ((contrast.train, {0, 1, 2, 7, 8, 9}), (contrast.test, {3, 4, 5, 6, 10, 11, 12, 13})):
        assert all(set(states.flatten().tolist()) == pooled for states in part)
    assert contrast.train[0].tolist() == [[0, 1, 2], [7, 8, 9]]
    assert contrast.sides().shape == (5, 2, 7) and contrast.sides(4).shape == (5, 2, 4)


def test_the_two_sided_p_value_is_that_of_the_rank():
    values = torch.arange(40.0)
    assert two_sided(values) == two_sided(-values) == 0.05  # the least that 39 others give
    assert two_sided(torch.tensor([1.0, 1.0, 1.0])) == 1


def test_half_samples_vary_as_samples_do(generator):
    values = torch.randn(100, generator=generator)
    means = torch.stack([values[half].mean() for half in half_samples(100, 2000, 0)])
    # The sd over 2000 halves has a relative standard error of 1/√4000 = 1.6 %; five of those.
    assert_close(float(means.std()), float(values.std()) / 10, rtol=0.08, atol=0)


def test_groups_with_the_same_mean_have_no_boundary():
    with pytest.raises(ValueError, match="the groups have the same mean state"):
        Contrast.of(4, 1, 0).boundaries(torch.ones(8, 3))
