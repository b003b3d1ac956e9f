from math import cos, radians, sin
from typing import Any

import pytest
import torch
from moving import moved
from scipy.stats import ks_2samp

from weightgeom.estimators.pairs import Decomposition
from weightgeom.geometry import nulls
from weightgeom.probes.rotation import Drawn, Rotation, noise, rotated

PROBE = Rotation(k=2, leading=3)
SPECTRUM = torch.tensor([5.0, 4.0, 2.0, 1.0], dtype=torch.float64)


def compared(
    before: torch.Tensor, after: torch.Tensor, probe: Rotation = PROBE, k: int = 2
) -> dict[str, float]:
    comparison = probe.compared(Decomposition.of(before), Decomposition.of(after), k)
    return dict(comparison.numbers)


def turned(degrees: float) -> torch.Tensor:
    """A rotation in the plane of the second and the third direction."""
    turn = torch.eye(4, dtype=torch.float64)
    angle = radians(degrees)
    turn[1, 1] = turn[2, 2] = cos(angle)
    turn[1, 2], turn[2, 1] = -sin(angle), sin(angle)
    return turn


def test_a_turn_of_the_second_of_two_directions_is_half_of_it_on_average_and_on_its_side_alone() -> None:
    before = SPECTRUM.diag()
    numbers = compared(before, turned(30) @ before)
    assert numbers["left_angle"] == pytest.approx(15) and numbers["right_angle"] == pytest.approx(0, abs=1e-6)
    assert numbers["spectral_shift"] == pytest.approx(0, abs=1e-12)
    assert compared(before, before @ turned(1e-4))["right_angle"] == pytest.approx(5e-5, rel=1e-3)


def test_a_scale_shifts_the_spectrum_alone() -> None:
    numbers = compared(SPECTRUM.diag(), 1.1 * SPECTRUM.diag())
    assert numbers["spectral_shift"] == pytest.approx(0.1)
    assert numbers["left_angle"] == numbers["intruders"] == pytest.approx(0, abs=1e-6)


def test_a_strong_new_direction_is_an_intruder() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.zeros(40, 6, dtype=torch.float64)
    before[:4, :4] = SPECTRUM.diag()
    new = torch.zeros(40, 6, dtype=torch.float64)
    new[20, 5] = 9  # a left direction in which the matrix wrote nothing
    assert compared(before, before)["intruders"] == 0
    assert compared(before, before + new)["intruders"] == 1
    small = 1e-3 * torch.randn(40, 6, generator=generator, dtype=torch.float64)
    assert compared(before, before + small)["intruders"] == 0


def test_a_rotated_update_keeps_its_spectrum_and_noise_its_norm() -> None:
    spectrum = torch.tensor([3.0, 2.0, 0.5], dtype=torch.float64)
    for n in (3, 8):
        drawn = rotated(spectrum, n, 0, 1)
        values = torch.linalg.eigvalsh(drawn.gram).flip(0).sqrt()
        assert torch.allclose(values, spectrum, rtol=1e-5)
        assert float(noise(spectrum, n, 0, 1).gram.trace().sqrt()) == pytest.approx(float(spectrum.norm()))
        # E Eᵀ is that of its first columns and, where n > m, of the others.
        rest = drawn.gram - drawn.inside @ drawn.inside.T
        assert float(torch.linalg.eigvalsh(rest).min()) > -1e-5
        assert (float(rest.norm()) < 1e-5) == (n == 3)


@pytest.mark.parametrize("shape", [(12, 16), (16, 12), (12, 12)])
def test_an_update_in_the_coordinates_of_the_matrix_compares_as_the_sum_of_both(shape, generator) -> None:
    before = torch.randn(shape, generator=generator, dtype=torch.float64)
    update = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    start = Decomposition.of(before)
    wide = update if shape[0] <= shape[1] else update.T
    short, long = (start.left, start.right) if shape[0] <= shape[1] else (start.right, start.left)
    drawn = Drawn(short.T @ wide @ long, short.T @ wide @ wide.T @ short)
    comparison, expected = (
        PROBE.drawn(start, drawn, 2),
        PROBE.compared(start, Decomposition.of(before + update), 2),
    )
    assert comparison.numbers == pytest.approx(expected.numbers, rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(12, 16), (16, 12), (12, 12)])
def test_the_nulls_have_the_distribution_of_updates_that_are_rotated_or_drawn(shape) -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(shape, generator=generator, dtype=torch.float64)
    update = 0.3 * torch.outer(
        torch.randn(shape[0], generator=generator, dtype=torch.float64),
        torch.randn(shape[1], generator=generator, dtype=torch.float64),
    )
    start, spectrum = Decomposition.of(before), torch.linalg.svdvals(update)

    def iid() -> torch.Tensor:
        gaussian = torch.randn(shape, generator=generator, dtype=torch.float64)
        return gaussian * (update.norm() / gaussian.norm())

    for draw, direct in ((rotated, lambda: nulls.rotated(update, generator)), (noise, iid)):
        null = [PROBE.drawn(start, draw(spectrum, max(shape), 0, index), 2).numbers for index in range(500)]
        drawn = [PROBE.compared(start, Decomposition.of(before + direct()), 2).numbers for _ in range(500)]
        for name in ("left_angle", "right_angle", "spectral_shift"):
            # Two samples of one distribution; of 18 such p-values one is below 1e-3 with probability 0.02.
            samples = [[numbers[name] for numbers in part] for part in (null, drawn)]
            test: Any = ks_2samp(samples[0], samples[1])
            assert test.pvalue > 1e-3, name


def test_a_probe_has_rows_with_both_nulls_for_every_matrix_that_moved(at, model, params) -> None:
    change = 0.01 * torch.randn(model.architecture.matrices[0].of(params).shape)
    after = moved(model, params, {model.architecture.matrices[0].name: change})
    rows = Rotation(draws=2, curve=3).measurement(at(params))(after)
    quantities = [row["quantity"] for row in rows]
    assert {(row["matrix"], row["layer"]) for row in rows} == {("q", 0)}
    assert quantities.count("left_cosine") == quantities.count("right_cosine") == 3
    for null in ("null", "noise"):
        for name in ("left_angle", "right_angle", "spectral_shift", "intruders"):
            assert {name, f"{null}_{name}_mean", f"{null}_{name}_sd"} <= set(quantities)
