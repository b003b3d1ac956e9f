"""Tasks, bytes and hours of `experiment=atlas` on published chains; memory and time by the size of a model.

    .venv/bin/python benchmarks/atlas.py [--width 1024] [--tokens 8192] [--task-gb 200] [--cores 8]

One layer of a Llama of that width is measured here, on one thread: the processor time of its reference
subspaces, by token and for the rest, and that of one revision against them. All else is computed: time by
width³, or width² for a token, by layers and by the number of matrices; bytes from the configs; memory from
`RSF.held`, which `plan=true` prints, with budget_gb=4. Nothing is downloaded. A task has the first revision
on a local disk, and reads its own over a network that all tasks share.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time

import torch
from material import llama, write_pair

from weightgeom.bases.outline import Shape
from weightgeom.data.world import World
from weightgeom.estimators.kept_frames import keep_frames
from weightgeom.estimators.reference_subspaces import most_tokens
from weightgeom.interfaces import Setting
from weightgeom.models.loading import load
from weightgeom.probes.rsf import RSF

GIGABIT = 1.25e8  # bytes a second
BUDGET = 4.0  # GiB


@dataclass(frozen=True)
class Size:
    """A dense decoder by its config; `stored` bytes a parameter on disk."""

    name: str
    d: int
    layers: int
    read: int  # matrices of a layer that read the stream; those that write it are two
    vocabulary: int
    parameters: float
    stored: int = 2

    @property
    def bytes(self) -> float:
        return self.stored * self.parameters


# Hugging Face configs; parameters with both embeddings where they are untied.
PYTHIA = [
    Size("pythia-70m", 512, 6, 4, 50304, 70.4e6),
    Size("pythia-160m", 768, 12, 4, 50304, 162.3e6),
    Size("pythia-410m", 1024, 24, 4, 50304, 405.3e6),
    Size("pythia-1b", 2048, 16, 4, 50304, 1011.8e6),
    Size("pythia-1.4b", 2048, 24, 4, 50304, 1414.6e6),
    Size("pythia-2.8b", 2560, 32, 4, 50304, 2775.2e6),
    Size("pythia-6.9b", 4096, 32, 4, 50432, 6857.3e6),
    Size("pythia-12b", 5120, 36, 4, 50688, 11846.1e6),
]
OLMO = Size("Olmo-3-7B", 4096, 32, 5, 100278, 7298.0e6)
CHAINS = [*((size, 154) for size in PYTHIA), (OLMO, 1700)]
SIZES = [
    Size("SmolLM2-135M", 576, 30, 5, 49152, 134.5e6),
    Size("Llama-3.2-1B", 2048, 16, 5, 128256, 1235.8e6),
    Size("Llama-2-7B", 4096, 32, 5, 32000, 6738.4e6),
    Size("Llama-3.1-70B", 8192, 80, 5, 128256, 70553.7e6),
    Size("Llama-3.1-405B", 16384, 126, 5, 128256, 405853.4e6),
]


@dataclass(frozen=True)
class Rates:
    """Processor seconds of a layer, divided by the power of its width that they grow with."""

    token: float  # of the passes, over d² tokens
    frames: float  # of decompositions and bootstrap, over d³
    revision: float  # over d³

    def frames_hours(self, size: Size) -> float:
        """Core hours of the reference subspaces of a checkpoint."""
        tokens = most_tokens(size.d)
        return size.layers * (self.token * size.d**2 * tokens + self.frames * size.d**3) / 3600

    def revision_hours(self, size: Size) -> float:
        """Core hours of a revision against subspaces that are there, by the number of matrices."""
        return size.layers * self.revision * size.d**3 * (size.read + 2) / 7 / 3600


def rates(width: int, tokens: int) -> Rates:
    """Measured on a pair of one layer, in bfloat16."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as home:
        config = llama(width, round(2.6875 * width), 1, width // 64, 4096)
        before, after = write_pair(Path(home), config, torch.bfloat16)
        model = load(before, "cpu")
        start, end = (model.params(place) for place in (before, after))
        examples = World(documents=10, heldout=tokens // 8).examples()
        setting = Setting(model, start, end, False, examples, 0)
        few, many = (timed_frames(setting, count, Path(home, str(count))) for count in (tokens // 4, tokens))
        shared = replace(setting, shared=lambda work: Path(home, str(tokens)))
        began = process_time()
        assert RSF(tokens=tokens).measurement(shared)(end)
        spent = process_time() - began
    per_token = (many - few) / (tokens - tokens // 4)
    rest = max(0.0, few - per_token * (tokens // 4))
    print(
        f"measured on one thread, a layer of d = {width}: {1e3 * per_token:.3g} ms a token,"
        f" {rest:.1f} s for the rest of its subspaces, {spent:.1f} s for a revision against them"
    )
    return Rates(per_token / width**2, rest / width**3, spent / width**3)


def timed_frames(setting: Setting, tokens: int, directory: Path) -> float:
    """Processor seconds of the reference subspaces, which are kept in `directory`."""
    directory.mkdir()
    began = process_time()
    keep_frames(RSF(tokens=tokens)._frames(setting, setting.start, True), directory)
    return process_time() - began


def frames_bytes(size: Size) -> float:
    """Reference subspaces on disk: of two inputs a layer a root, 40 bootstrap bases, and directions."""
    k = size.d // 8
    return 2 * size.layers * size.d * (4.0 * size.d + 2.0 * 40 * k + 3 * 8.0 * k)


def memory(size: Size) -> float:
    """Peak bytes above start-up of a process that makes the subspaces, as `RSF.held` has them."""
    shape = Shape(
        size.d, size.layers, size.vocabulary, False, int(size.parameters), 0.0, False, 96, compared=2
    )
    return RSF(budget_gb=BUDGET).held(shape, objective=False)


def main() -> None:
    """Measure a layer, print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--task-gb", type=float, default=200.0, help="bytes that a task reads, in GB")
    parser.add_argument("--task-hours", type=float, default=4.0, help="that a task computes")
    parser.add_argument("--cores", type=int, default=8, help="of a task")
    parser.add_argument("--tasks", type=int, default=64, help="that run at a time")
    options = parser.parse_args()
    rate = rates(options.width, options.tokens)
    print("\n| chain | revisions | tasks | TB | h at 1 Gbit/s | h at 10 | core h | h on the cores | limit |")
    print("|---|---|---|---|---|---|---|---|---|")
    totals = [0.0] * 5
    for size, revisions in CHAINS:
        moved = revisions * size.bytes
        hours = revisions * rate.revision_hours(size) / options.cores
        wanted = max(moved / (1e9 * options.task_gb), hours / options.task_hours)
        tasks = min(revisions - 1, max(1, round(wanted)))
        core = rate.frames_hours(size) + revisions * rate.revision_hours(size)
        busy = min(tasks, options.tasks) * options.cores
        here = rate.frames_hours(size) / options.cores + revisions * rate.revision_hours(size) / busy
        slow, fast = (moved / (GIGABIT * speed) / 3600 for speed in (1, 10))
        limit = "network" if fast > here else "cores" if here > slow else "network at 1, cores at 10"
        print(
            f"| {size.name} | {revisions} | {tasks} | {moved / 1e12:.2f} | {slow:.2g} | {fast:.2g} |"
            f" {core:.3g} | {here:.2g} | {limit} |"
        )
        if size is not OLMO:
            totals = [one + more for one, more in zip(totals, (tasks, moved, slow, fast, core), strict=True)]
    print("| all of Pythia | 1,232 | {:.0f} | {:.2f} | {:.2g} | {:.2g} | {:.3g} | | |".format(
        totals[0], totals[1] / 1e12, *totals[2:]))  # fmt: skip
    print("\n| size | memory, GB | subspaces, GB | core h for them | core h a revision | GB a revision |")
    print("|---|---|---|---|---|---|")
    for size in SIZES:
        print(
            f"| {size.name} | {memory(size) / 1e9:.1f} | {frames_bytes(size) / 1e9:.1f} |"
            f" {rate.frames_hours(size):.2g} | {rate.revision_hours(size):.2g} | {size.bytes / 1e9:.1f} |"
        )


if __name__ == "__main__":
    main()
