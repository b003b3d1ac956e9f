"""Overlap of visible changes with the smallest weights: published, of unstructured updates, of real ones.

    python benchmarks/mask_overlap.py BASE NAME=TRAINED [NAME=TRAINED ...] --figure docs/mask_overlap.png

The published numbers are those of arXiv:2606.07082. BASE is rounded to bf16, as a released checkpoint is, and
TRAINED - BASE is added to it; an entry is visible if that sum, rounded to bf16, is another value. The curve
is the overlap that an iid Gaussian update of equal visible share has on BASE. One matrix is in memory at a
time.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from weightgeom.figures.base import STYLE
from weightgeom.models.loading import load_architecture
from weightgeom.models.weights import open_params
from weightgeom.probes.sparsity import Cells, smallest

ALPHA = 0.3  # the share of entries in the mask of the smallest
PUBLISHED = {  # name: visible share, overlap with the 30 % smallest
    "SFT": (0.927, 0.319),
    "on-policy distillation": (0.463, 0.536),
    "RLVR": (0.278, 0.735),
}
SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.278, 0.4, 0.463, 0.6, 0.75, 0.85, 0.927, 0.98)
SAMPLED = 2**16  # entries of each matrix, spread evenly over it, that its null is taken over
SAMPLED_BY_THE_CURVE = 2**14
GRID = torch.bfloat16


def matrices(before: Path, after: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name and entries of every matrix of the residual stream: before on the grid, and with the update."""
    architecture = load_architecture(before)
    start, end = (open_params(directory, architecture) for directory in (before, after))
    for matrix in architecture.matrices:
        before_it, after_it = (matrix.of(params).float().flatten() for params in (start, end))
        on_grid = before_it.to(GRID).float()
        yield matrix.label, on_grid, on_grid + (after_it - before_it)


def visible(cells: Cells, sigma: float) -> Tensor:
    """P(an entry is visible) under an iid Gaussian update of standard deviation sigma."""
    below, above = cells.below.double(), cells.above.double()
    return 1 - torch.special.ndtr(above / sigma) + torch.special.ndtr(-below / sigma)


def thinned(entries: Tensor, most: int) -> Tensor:
    """About `most` entries, spread evenly over rows and columns."""
    stride = len(entries) // most
    while stride > 1 and any(stride % part == 0 for part in (2, 3)):  # widths are multiples of these
        stride -= 1
    return entries[:: max(1, stride)]


def null(start: Tensor, share: float) -> float:
    """The overlap of an iid update that is visible in `share` of the entries."""
    cells = Cells.of(start, GRID)
    p = visible(cells, cells.matching(share, near=0))
    return float((smallest(start.abs(), ALPHA) * p).sum() / p.sum())


def measured(before: Path, after: Path) -> dict[str, float]:
    """Visible share, overlap and its null, over all entries; the null is matched matrix by matrix."""
    entries = moved = inside = expected = zeros = 0.0
    for _, start, end in matrices(before, after):
        changed = start != end.to(GRID).float()
        count = float(changed.sum())
        entries += len(start)
        if count:
            moved += count
            inside += float(smallest(start.abs(), ALPHA)[changed].sum())
            expected += count * null(thinned(start, SAMPLED), count / len(start))
        zeros += float((start == 0).sum())
    shares = {"visible": moved / entries, "zeros": zeros / entries}
    return {**shares, "overlap": inside / moved, "null": expected / moved}


def curve(before: Path) -> dict[float, list[float]]:
    """The null of every matrix by visible share, on entries that are spread evenly over it."""
    nulls: dict[float, list[float]] = {share: [] for share in SHARES}
    for _, start, _ in matrices(before, before):
        for share in SHARES:
            nulls[share].append(null(thinned(start, SAMPLED_BY_THE_CURVE), share))
    return nulls


def draw(curves: dict[float, list[float]], gaussian: list[float], points: dict[str, dict[str, float]]):
    """Published points, the null over the visible share, and measured updates."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(4.6, 2.9), layout="constrained")
        shares = [100 * share for share in SHARES]
        low, high = ([100 * end(values) for values in curves.values()] for end in (min, max))
        mean = [100 * sum(values) / len(values) for values in curves.values()]
        axis.fill_between(shares, low, high, color="0.88", lw=0, label="all matrices of this base")
        axis.plot(shares, mean, color="0.45", lw=1.2, label="iid update (null), mean over matrices")
        axis.plot(
            shares,
            [100 * value for value in gaussian],
            color="0.45",
            lw=1,
            ls=":",
            label="on Gaussian weights",
        )
        axis.axhline(100 * ALPHA, color="0.6", lw=0.8, ls="--")
        axis.text(
            0.5, 100 * ALPHA - 1, "30 %: the share of weights in the mask", color="0.4", va="top", fontsize=7
        )
        labels = {"x": "published (arXiv:2606.07082)", "o": "measured here"}
        published = {name: (x, y, "x", "#1f4e9c") for name, (x, y) in PUBLISHED.items()}
        here = {name: (p["visible"], p["overlap"], "o", "#c1272d") for name, p in points.items()}
        for name, (x, y, marker, colour) in {**published, **here}.items():
            axis.plot(100 * x, 100 * y, marker, color=colour, ms=5, mew=1.3, label=labels.pop(marker, None))
            axis.annotate(
                name,
                (100 * x, 100 * y),
                (5, 4),
                textcoords="offset points",
                color=colour,
                fontsize=7,
            )
        axis.set(
            xlabel="visible entries (%)",
            ylabel="overlap with the 30 % smallest weights (%)",
            xlim=(0, 100),
            ylim=(20, 106),
        )
        axis.legend(loc="upper right", bbox_to_anchor=(1, 0.92))
    return figure


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base", type=Path)
    parser.add_argument("trained", nargs="+", help="NAME=DIRECTORY")
    parser.add_argument("--figure", type=Path, default=Path("mask_overlap.png"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    points = {}
    for text in asked.trained:
        name, _, directory = text.partition("=")
        points[name] = measured(asked.base, Path(directory))
        print(json.dumps({"update": name, **points[name]}), flush=True)
    curves = curve(asked.base)
    weights = (0.02 * torch.randn(2**18, generator=torch.Generator().manual_seed(0))).to(GRID).float()
    gaussian = [null(weights, share) for share in SHARES]
    for share, values, of_gaussian in zip(SHARES, curves.values(), gaussian, strict=True):
        line = {"visible": share, "null": sum(values) / len(values), "min": min(values), "max": max(values)}
        print(json.dumps({**line, "gaussian": of_gaussian}), flush=True)
    draw(curves, gaussian, points).savefig(asked.figure, dpi=140)


if __name__ == "__main__":
    main()
