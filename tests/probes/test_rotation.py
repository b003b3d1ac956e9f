from math import cos, radians, sin, sqrt

import pytest
import torch
from moving import moved

from weightgeom.probes.rotation import Decomposition, Rotation, noise, rotated

PROBE = Rotation(k=2, leading=3)
SPECTRUM = torch.tensor([5.0, 4.0, 2.0, 1.0], dtype=torch.float64)


def compared(
    before: torch.Tensor, after: torch.Tensor, probe: Rotation = PROBE, k: int = 2
) -> dict[str, float]:
    comparison = probe._compared(Decomposition.of(before.double()), Decomposition.of(after.double()), k)
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
    quantities = compared(before, turned(30) @ before)
    assert quantities["left_angle"] == pytest.approx(15) and quantities["right_angle"] == pytest.approx(
        0, abs=1e-6
    )
    assert quantities["spectral_shift"] == pytest.approx(0, abs=1e-12)
    assert compared(before, before @ turned(1e-4))["right_angle"] == pytest.approx(5e-5, rel=1e-3)


def test_a_scale_shifts_the_spectrum_alone() -> None:
    quantities = compared(SPECTRUM.diag(), 1.1 * SPECTRUM.diag())
    assert quantities["spectral_shift"] == pytest.approx(0.1)
    assert quantities["left_angle"] == quantities["intruders"] == pytest.approx(0, abs=1e-6)


def test_a_strong_new_direction_is_an_intruder() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.zeros(40, 6, dtype=torch.float64)
    before[:4, :4] = SPECTRUM.diag()
    new = torch.zeros(40, 6, dtype=torch.float64)
    new[20, 5] = 9  # a left direction in which the matrix wrote nothing
    assert compared(before, before)["intruders"] == 0
    assert compared(before, before + new)["intruders"] == 1
    assert compared(before, before + 1e-3 * noise(new, generator))["intruders"] == 0


def test_a_rotated_update_keeps_its_spectrum_and_noise_its_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    update = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    spectrum = torch.linalg.svdvals(update)
    assert torch.allclose(torch.linalg.svdvals(rotated(update, generator)), spectrum)
    assert float(noise(update, generator).norm()) == pytest.approx(float(update.norm()))


@pytest.mark.slow
def test_under_a_rotated_update_every_number_is_a_draw_from_its_null() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    update = (
        0.3
        * torch.randn(12, 1, generator=generator, dtype=torch.float64)
        @ torch.randn(1, 16, generator=generator, dtype=torch.float64)
    )
    start = Decomposition.of(before)

    def draws(count: int) -> dict[str, torch.Tensor]:
        draws = [
            PROBE._compared(start, Decomposition.of(before + rotated(update, generator)), 2).numbers
            for _ in range(count)
        ]
        return {name: torch.tensor([numbers[name] for numbers in draws]) for name in draws[0]}

    null, drawn = draws(500), draws(500)
    for name in ("left_angle", "right_angle", "spectral_shift"):
        edge = null[name].quantile(0.95)
        rejected = float((drawn[name] > edge).double().mean())
        assert abs(rejected - 0.05) < 3 * sqrt(2 * 0.05 * 0.95 / 500), name


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
