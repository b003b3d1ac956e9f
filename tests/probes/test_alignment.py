from dataclasses import replace

import pytest
import torch
from moving import matrix_of

from weightgeom.analysis.chain import STAGES
from weightgeom.estimators.alignment import overlap, top_right
from weightgeom.probes.alignment import Alignment, named_updates, walked
from weightgeom.table import of_matrices, tabulate

PROBE = Alignment(k=2)
NAME = "L0.down"


@pytest.fixture
def trajectory(model, params, at, generator):
    """The setting of a trajectory whose updates of one matrix are given; no other one moves."""

    def setting(*updates):
        matrix, weights = matrix_of(model, NAME), [params]
        for update in updates:
            weights.append(dict(matrix.replaced(weights[-1], matrix.of(weights[-1]) + update.float())))
        checkpoints = dict(enumerate(weights))
        return replace(at(params, weights[-1]), checkpoints=checkpoints, last=len(updates))

    return setting


def low_rank(model, params, rank, generator):
    d_out, d_in = matrix_of(model, NAME).of(params).shape
    return torch.randn(d_out, rank, generator=generator) @ torch.randn(rank, d_in, generator=generator)


def measured(probe, setting):
    measure = probe.measurement(setting)
    parts = [measure(params) for params in setting.checkpoints.values()]
    assert not any(parts[:-1])
    return parts[-1]


def value(rows, quantity, step, against="", whole=False):
    (row_of_pair,) = (
        row
        for row in rows
        if (row["quantity"], row["step"], row.get("against", "")) == (quantity, step, against)
        and ("matrix" not in row) == whole
    )
    return row_of_pair["value"]


def test_updates_that_repeat_and_reverse_have_their_cosines(model, params, trajectory, generator):
    a, b = (low_rank(model, params, 1, generator) for _ in range(2))
    rows = measured(PROBE, trajectory(a, b, -a))
    expected = float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    for whole in (False, True):
        assert value(rows, "cosine", 2, "1", whole) == pytest.approx(expected, abs=1e-4)
        assert value(rows, "cosine", 3, "1", whole) == pytest.approx(-1, abs=1e-4)
        assert value(rows, "alignment_ratio", 1, "3", whole) == pytest.approx(1, abs=1e-4)
        assert value(rows, "alignment_ratio", 3, "1", whole) == pytest.approx(1, abs=1e-4)
        assert value(rows, "mode_overlap", 3, "1", whole) == pytest.approx(1, abs=1e-4)
        assert value(rows, "previous_cosine", 3, whole=whole) == pytest.approx(-expected, abs=1e-4)
    table = tabulate(rows)
    assert set(of_matrices(table, "previous_cosine")["step"]) == {2, 3}
    for name in ("mean", "sd"):
        assert len(of_matrices(table, f"null_previous_cosine_{name}")) == 2


def test_locking_is_1_in_the_same_directions_and_chance_in_others(model, params, trajectory, generator):
    a = low_rank(model, params, 2, generator)
    rows = measured(PROBE, trajectory(a, a, 0.5 * a))
    assert value(rows, "locking", 1) == pytest.approx(1, abs=1e-3)
    assert value(rows, "null_locking_mean", 1) == pytest.approx(2 / a.shape[1])
    assert value(rows, "null_locking_mean", 1) < value(rows, "walk_locking_mean", 1) < 0.9
    # Of two unrelated updates, the later one 100 times the earlier, the directions at the end are its own.
    b = low_rank(model, params, 2, generator)
    rows = measured(PROBE, trajectory(0.01 * a, b))
    v = [torch.linalg.svd(x.double()).Vh[:2] for x in (0.01 * a, 0.01 * a + b)]
    assert value(rows, "locking", 1) == pytest.approx(float((v[0] @ v[1].T).square().sum() / 2), abs=1e-3)


@pytest.mark.slow
def test_locking_of_random_updates_is_a_draw_from_its_null(generator):
    overlaps = []
    for _ in range(500):
        first, other = (top_right(torch.randn(8, 12, generator=generator), 3) for _ in range(2))
        assert first is not None and other is not None
        overlaps.append(overlap(first, other))
    values = torch.tensor([locked for locked, _, _ in overlaps], dtype=torch.float64)
    _, mean, sd = overlaps[0]
    assert mean == 0.25
    assert abs(float(values.mean()) - mean) < 4 * sd / 500**0.5
    assert abs(float(values.std()) / sd - 1) < 0.15


@pytest.mark.slow
def test_locking_of_a_random_walk_is_a_draw_from_its_own_null_and_above_the_other(generator):
    update = torch.randn(8, 12, generator=generator)
    rest = torch.randn(8, 12, generator=generator)
    space = top_right(update, 3)
    assert space is not None
    null = walked(update, rest, space, 3, 500, generator)
    overlaps = []
    for _ in range(500):
        # Gaussian entries have random directions; their singular values are those of the rest.
        left, _, right = torch.linalg.svd(torch.randn(8, 12, generator=generator), full_matrices=False)
        end = top_right(update + left @ torch.linalg.svdvals(rest).diag() @ right, 3)
        assert end is not None
        overlaps.append(overlap(space, end)[0])
    drawn = torch.tensor(overlaps, dtype=torch.float64)
    rejected = float((drawn > null.quantile(0.95)).double().mean())
    assert abs(rejected - 0.05) < 3 * (2 * 0.05 * 0.95 / 500) ** 0.5
    assert drawn.mean() > 0.25 + 20 * drawn.std() / 500**0.5


def test_an_interrupted_measurement_needs_the_last_checkpoint_alone(model, params, trajectory, generator):
    setting = trajectory(*(low_rank(model, params, 3, generator) for _ in range(3)))
    assert PROBE.measurement(setting)(setting.end) == measured(PROBE, setting) != []


def test_of_many_checkpoints_evenly_spread_ones_are_taken(model, params, trajectory, generator):
    a = low_rank(model, params, 2, generator)
    rows = measured(Alignment(k=2, most=3), trajectory(*(place * a for place in range(1, 7))))
    assert {(row["step"], row["against"]) for row in rows if row["quantity"] == "cosine"} == {
        (4, "2"), (6, "2"), (6, "4"),
    }  # fmt: skip


def test_two_checkpoints_have_no_pairs_of_updates(model, params, trajectory, generator):
    assert measured(PROBE, trajectory(low_rank(model, params, 2, generator))) == []
    assert measured(PROBE, trajectory(*(0 * low_rank(model, params, 2, generator) for _ in range(3)))) == []


@pytest.mark.slow
def test_the_summary_and_the_figures_name_the_stages(model, params, trajectory, generator, tmp_path):
    from weightgeom.figures.base import save

    a, b, c = (low_rank(model, params, 2, generator) for _ in range(3))
    table = tabulate(measured(PROBE, trajectory(a, b, c)))
    assert list(named_updates(table).values()) == ["step 1", "step 2", "step 3"]
    table.attrs[STAGES] = ["base", "sft", "dpo", "rl"]
    shown = PROBE.summary(table)
    assert [*zip(shown["update"], shown["against"], strict=True)] == [
        ("dpo", "sft"), ("rl", "sft"), ("rl", "dpo"),
    ]  # fmt: skip
    figures = PROBE.figures({"training": table})
    assert set(figures) == {"alignment", "locking"} and PROBE.figures({}) == {}
    for name, figure in figures.items():
        save(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
