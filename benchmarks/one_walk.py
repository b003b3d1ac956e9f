"""Cost of all probes that compare two models, over that of the probe `rsf` alone.

    .venv/bin/python benchmarks/one_walk.py
    .venv/bin/python benchmarks/one_walk.py --layers 4 --each

On the random pair of `rsf_cost.py`, of SmolLM2-135M's shape (`--layers` cuts it), on one thread and in one
process, with all defaults and no objective, as `objective=none model=pair` has it. `together` is all of them:
rsf, one walk that hands every matrix to sparsity, rotation, spectrum and overlap, and connectivity. With
`--each`, every probe also by itself. `alignment` compares the updates of three checkpoints or more, so that a
pair has no rows of it. Processor times, and the bytes of the tensors that were asked for, as multiples
of both files.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from rsf_cost import WORLD, make

from weightgeom.estimators.pairs import OfPairs, together
from weightgeom.estimators.per_matrix import as_probe
from weightgeom.interfaces import Probe, Setting
from weightgeom.models.loading import load
from weightgeom.params import Params
from weightgeom.probes.alignment import Alignment
from weightgeom.probes.connectivity import Connectivity
from weightgeom.probes.overlap import Overlap
from weightgeom.probes.rotation import Rotation
from weightgeom.probes.rsf import RSF
from weightgeom.probes.sparsity import Sparsity
from weightgeom.probes.spectrum import Spectrum

PROBES: dict[str, object] = {
    "rsf": RSF(),
    "sparsity": Sparsity(),
    "rotation": Rotation(),
    "spectrum": Spectrum(),
    "overlap": Overlap(),
    "alignment": Alignment(),
    "connectivity": Connectivity(),
}


class Counted(Mapping[str, torch.Tensor]):
    """Weights that count the bytes of the tensors that are asked for."""

    def __init__(self, params: Params) -> None:
        self.params, self.bytes = params, 0

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor."""
        tensor = self.params[name]
        self.bytes += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self.params)

    def __len__(self) -> int:
        """Their number."""
        return len(self.params)


def main() -> None:
    """Make the pair, measure it by each probe and by all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--each", action="store_true", help="also every probe by itself")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as directory:
        make(Path(directory), options.layers)
        report(Path(directory), options.each)


def report(directory: Path, each: bool) -> None:
    """Print the times."""
    model = load(directory / "before", "cpu")
    before, after = (Counted(model.params(directory / name)) for name in ("before", "after"))
    setting = Setting(
        *(model, before, after, False, WORLD.examples(), 0), last=1, checkpoints={0: before, 1: after}
    )
    whole = sum(tensor.nbytes for weights in (before, after) for tensor in weights.params.values())
    probes: dict[str, Probe] = {name: as_probe(probe) for name, probe in PROBES.items()}  # pyright: ignore[reportAssignmentType]
    shown = Table("", "seconds", "times rsf", "bytes", "rows")
    seconds: dict[str, float] = {}

    def measured(name: str, rows: Callable[[], int], *parts: str) -> None:
        start, asked = time.process_time(), before.bytes + after.bytes
        count = rows()
        seconds[name] = time.process_time() - start + sum(seconds[part] for part in parts)
        asked = before.bytes + after.bytes - asked
        ratio = seconds[name] / seconds["rsf"]
        shown.add_row(name, f"{seconds[name]:.1f}", f"{ratio:.2f}", f"{asked / whole:.2f}", str(count))
        print(f"{name}: {seconds[name]:.1f} s, {ratio:.2f} times rsf", flush=True)

    walked = {name: probe for name, probe in probes.items() if isinstance(probe, OfPairs)}
    for name, probe in probes.items():
        if each or name not in walked:
            measured(name, lambda probe=probe: len(probe.measurement(setting)(after)))
    walk = ", ".join(walked)
    measured(walk, lambda: sum(map(len, together(walked, setting)(after).values())))
    others = [name for name in probes if name not in walked]
    measured("together", lambda: 0, *others, walk)
    Console(width=140).print(shown)


if __name__ == "__main__":
    main()
