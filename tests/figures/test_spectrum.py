from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from weightgeom.figures.base import COLOURS
from weightgeom.figures.spectrum import stable_ranks, things
from weightgeom.table import row, tabulate


def spectra(*drawn: str):
    """Stable ranks from 2 (update) or 30 (weights) on in two layers, with a null of 10 ± 0.5."""
    rows = []
    for thing in drawn:
        for layer in (0, 1):
            for matrix, role, more in (("q", "read", 0), ("down", "write", 3)):
                at: dict[str, Any] = {
                    "layer": layer,
                    "matrix": matrix,
                    "role": role,
                    "n": 9,
                    "subspace": "residual",
                }
                value = {"delta": 2.0, "weight": 30.0}[thing] + layer + more
                rows.append(row(f"{thing}_stable_rank", value, step=4, **at))
                rows.append(row(f"null_{thing}_stable_rank_mean", 10.0, step=4, **at))
                rows.append(row(f"null_{thing}_stable_rank_sd", 0.5, step=4, **at))
                rows.append(row(f"{thing}_stable_rank", 99.0, step=0, **at))
    return tabulate(rows)


def test_stable_ranks_are_drawn_over_those_of_noise_at_the_last_step():
    figure = stable_ranks(spectra("weight", "delta"))
    expected = [("q", [0.2, 0.3]), ("down", [0.5, 0.6]), ("q", [3.0, 3.1]), ("down", [3.3, 3.4])]
    for axis, (matrix, values) in zip(figure.axes, expected, strict=True):
        (line,) = [line for line in axis.lines if line.get_label() == matrix]
        assert np.asarray(line.get_ydata()).tolist() == pytest.approx(values)
        assert to_hex(line.get_color()) == COLOURS[matrix]
        (band,) = axis.collections
        heights = np.asarray(band.get_paths()[0].vertices)[:, 1]
        assert (heights.min(), heights.max()) == pytest.approx((0.9, 1.1))
    assert "update" in figure.axes[0].get_ylabel() and "weights" in figure.axes[2].get_ylabel()


def test_an_update_alone_has_one_row_of_panels_and_no_stable_rank_none():
    assert len(stable_ranks(spectra("delta")).axes) == 2
    none = spectra("delta").query("quantity != 'delta_stable_rank'")
    assert things(none) == []
    with pytest.raises(ValueError, match="no stable rank of an update or of weights"):
        stable_ranks(none)
