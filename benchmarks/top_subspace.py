"""Time of the iterative `Subspace.top` against full fp64 `eigh`, and how far their subspaces agree.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/top_subspace.py
    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/top_subspace.py --threads 2 --d 1024 2048 --k 64 128

The variable sets the threads of SciPy's BLAS, `--threads` those of torch. Two minutes on an idle core.
"""

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from weightgeom.geometry.subspace import Subspace


def spectra(d: int) -> dict[str, Tensor]:
    """Eigenvalues like those of activations, and two that are harder."""
    power = torch.arange(1, d + 1, dtype=torch.float64).pow(-1)
    outlier = power.clone()
    outlier[0] = 20 * power.sum()  # one direction with 95 % of the trace, as in trained transformers
    return {
        "1/i": power,
        "1/i, outlier": outlier,
        "1/√i": power.sqrt(),
        "flat": torch.linspace(1, 0.5, d, dtype=torch.float64),  # gaps of 1/2d
    }


def seconds(work: Callable[[], Subspace], repeats: int) -> tuple[float, Subspace]:
    """Median time of a call, and its result."""
    times, spaces = [], []
    for _ in range(repeats):
        start = perf_counter()
        spaces.append(work())
        times.append(perf_counter() - start)
    return median(times), spaces[-1]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--d", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--k", type=int, nargs="+", default=[64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    table = Table("d", "k", "spectrum", "full, s", "fast, s", "ratio", "1 - overlap", "1 - expl.")
    for d in options.d:
        generator = torch.Generator().manual_seed(0)
        axes = Subspace.random(d, d, generator).basis
        for name, eigenvalues in spectra(d).items():
            moment = ((axes * eigenvalues) @ axes.T).float()
            moment = (moment + moment.T) / 2
            for k in options.k:
                slow, full = seconds(lambda m=moment, k=k: Subspace.top(m, k, solver="full"), 1)
                fast, approximate = seconds(
                    lambda m=moment, k=k: Subspace.top(m, k, solver="iterative"), options.repeats
                )
                overlap = float((full.basis.T @ approximate.basis).square().sum() / k)
                explained = approximate.explained(moment) / full.explained(moment)
                figures = (f"{slow:.3f}", f"{fast:.3f}", f"{slow / fast:.1f}")
                table.add_row(str(d), str(k), name, *figures, f"{1 - overlap:.1e}", f"{1 - explained:.1e}")
    console = Console()
    console.print(table)
    console.print(
        "The seconds are those for the top k eigenvectors, in fp64, of one fp32 d x d matrix with "
        f"{options.threads} thread(s): `torch.linalg.eigh` (one call) against ARPACK with its check for "
        f"missed directions and its fall-back to eigh (median of {options.repeats}); "
        "overlap is tr(P P')/k, explained the ratio of the two explained shares.",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
