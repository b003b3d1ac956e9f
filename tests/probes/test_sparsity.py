from math import inf, isfinite, nextafter, sqrt

import pytest
import torch
from scipy.stats import kstest

from weightgeom.interfaces import MatrixFunction
from weightgeom.probes.sparsity import Cells, Sparsity, smallest

PROBE = Sparsity()


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_a_function_of_two_matrices() -> None:
    assert isinstance(PROBE, MatrixFunction)


def test_shares_of_a_worked_example() -> None:
    # bf16 has steps of 2^-7 from 1 to 2: an entry at 1 is visible from half a step, 0.0039, on.
    before = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0]])
    after = torch.tensor([[1.0, 1.000005, 1.0005, 1.003, 1.005]])
    quantities = PROBE.of_matrix(before, after)
    assert quantities["unmoved_share"] == pytest.approx(1 / 5)
    assert quantities["absolute_unmoved_share"] == pytest.approx(2 / 5)
    assert quantities["relative_unmoved_share"] == pytest.approx(3 / 5)
    assert quantities["invisible_share"] == pytest.approx(4 / 5)


def test_overlaps_of_a_worked_example() -> None:
    # Rank one: all of it is principal. Of ten products, the two largest come last and the two smallest first.
    before = torch.outer(torch.ones(1), torch.arange(1.0, 11.0))
    after = before.clone()
    after[0, [0, 1, 8, 9]] *= 1.5
    quantities = Sparsity(alpha=0.2).of_matrix(before, after)
    assert quantities["low_overlap"] == pytest.approx(2 / 4)
    assert quantities["principal_overlap"] == pytest.approx(2 / 4)
    after[0, [8, 9]] = before[0, [8, 9]]
    quantities = Sparsity(alpha=0.2).of_matrix(before, after)
    assert quantities["low_overlap"] == pytest.approx(1) and quantities["principal_overlap"] == pytest.approx(
        0
    )


def test_ties_at_the_edge_of_a_mask_share_what_is_left() -> None:
    mask = smallest(torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0]), 0.4)
    assert mask.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3, 0])


@pytest.mark.parametrize("grid", [torch.bfloat16, torch.float16])
def test_an_entry_changes_its_value_on_the_grid_at_the_end_of_its_cell(grid: torch.dtype) -> None:
    entries = weights(1000)
    cells = Cells.of(entries, grid)
    for direction, distance in ((-1, cells.below), (1, cells.above)):
        wide = distance > 1e-4 * entries.abs()  # so that a thousandth of it is above the rounding of fp32
        assert wide.double().mean() > 0.7
        inside, beyond = (
            (entries + direction * distance * factor)[wide].to(grid) for factor in (0.999, 1.001)
        )
        rounded = entries[wide].to(grid)
        assert torch.equal(inside, rounded) and not (beyond == rounded).any()


def test_a_matrix_that_does_not_move_has_no_overlap() -> None:
    quantities = PROBE.of_matrix(weights(20, 30), weights(20, 30))
    assert quantities["invisible_share"] == quantities["null_invisible_share_mean"] == 1
    assert "low_overlap" not in quantities
    lowest = torch.zeros(2, 2)
    assert PROBE.of_matrix(lowest, lowest + nextafter(0, inf))["unmoved_share"] == 1  # a fp32 zero


def test_a_matrix_that_moves_below_the_grid_has_no_overlap_and_one_that_moves_everywhere_that_of_its_mask():
    before = weights(20, 30)
    after = before.clone()
    after[0, 0] *= 1 + 2e-7
    quantities = PROBE.of_matrix(before, after)
    assert (
        quantities["unmoved_share"] < quantities["invisible_share"] == 1 and "low_overlap" not in quantities
    )
    quantities = PROBE.of_matrix(before, 2 * before)
    assert quantities["low_overlap"] == pytest.approx(0.3) == quantities["null_low_overlap_mean"]
    assert quantities["null_low_overlap_sd"] == 0
    assert all(isfinite(value) for value in quantities.values())


def test_where_more_entries_are_zero_than_are_visible_the_null_is_that_of_the_zeros():
    before = weights(20, 30)
    before[:, :15] = 0  # any step is visible there, so that all of an iid update's visible entries are zeros
    after = before.clone()
    after[:5, 20:] *= 1.5
    quantities = PROBE.of_matrix(before, after)
    assert quantities["null_low_overlap_mean"] == pytest.approx(0.3 / 0.5, abs=1e-6)  # 180 of the 300 zeros


@pytest.mark.slow
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_under_an_iid_update_every_share_and_overlap_is_a_draw_from_its_null(stored: torch.dtype) -> None:
    before = weights(30, 40).to(stored).float()
    generator = torch.Generator().manual_seed(1)
    drawn: dict[str, list[float]] = {}
    for _ in range(500):
        after = (before + 5e-5 * torch.randn(before.shape, generator=generator)).to(stored).float()
        step = before + 5e-5 * torch.randn(before.shape, generator=generator)
        quantities = PROBE.of_matrix(before, after)
        shares = PROBE.of_matrix(before, step)  # an update's norm is known before it is rounded
        for name in ("low_overlap", "principal_overlap"):
            drawn.setdefault(name, []).append(
                (quantities[name] - quantities[f"null_{name}_mean"]) / quantities[f"null_{name}_sd"]
            )
        for name in ("invisible_share", "relative_unmoved_share", "absolute_unmoved_share"):
            drawn.setdefault(name, []).append(
                (shares[name] - shares[f"null_{name}_mean"]) / shares[f"null_{name}_sd"]
            )
    for name, scores in drawn.items():
        rejected = sum(score > 1.645 for score in scores) / len(scores)
        assert abs(rejected - 0.05) < 3 * sqrt(0.05 * 0.95 / 500) + 0.01, name
        assert kstest(scores, "norm").pvalue > 1e-3, name


@pytest.mark.parametrize(("visible", "overlap"), [(0.927, 0.319), (0.463, 0.545), (0.278, 0.759)])
def test_the_iid_null_of_gaussian_weights_has_the_overlaps_that_were_published_as_findings(
    visible: float, overlap: float
) -> None:
    before = weights(512, 512).bfloat16().float()
    sigma = Cells.of(before.flatten(), torch.bfloat16).matching(visible, 0.0)
    after = before + sigma * torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    quantities = PROBE.of_matrix(before, after.bfloat16().float())
    assert 1 - quantities["invisible_share"] == pytest.approx(visible, abs=0.005)
    assert quantities["null_low_overlap_mean"] == pytest.approx(overlap, abs=0.01)
    assert quantities["low_overlap"] == pytest.approx(quantities["null_low_overlap_mean"], abs=0.005)
