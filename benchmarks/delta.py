"""Time and memory of the norms and projections of every residual matrix's update, against only reading it.

python benchmarks/delta.py [--dtype bfloat16]
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from material import llama, measured, ready, write_pair
from transformers import AutoModelForCausalLM

from weightgeom.estimators.updates import projected
from weightgeom.geometry.subspace import Subspace
from weightgeom.models.loading import load_architecture
from weightgeom.models.residual import Architecture
from weightgeom.models.weights import open_params

K = 64  # dimensions of the subspace on either side
SHAPE = {"width": 2048, "mlp": 5504, "heads": 16, "vocabulary": 1024}
LAYERS = {"float32": 6, "bfloat16": 12}  # 1.2 GB each
Times = tuple[float, float]
DECOMPOSED = 7  # matrices, one layer, of which the SVD is timed


def main() -> None:
    """Generate the pair, measure each way in a process of its own, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=LAYERS, default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", nargs=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.work:
        work(options.work[0], Path(options.work[1]))
        return
    with TemporaryDirectory() as directory:
        config = llama(layers=LAYERS[options.dtype], **SHAPE)
        pair = write_pair(Path(directory), config, getattr(torch, options.dtype))
        size = sum(path.stat().st_size for path in pair[0].glob("*.safetensors"))
        threads = ["--threads", str(options.threads)]
        results = {way: measured(__file__, way, directory, *threads) for way in WAYS}
    matrices = 7 * LAYERS[options.dtype]
    print(
        f"{matrices} matrices, {size / 1e9:.2f} GB a checkpoint, {options.dtype}, threads: {options.threads}"
    )
    print(f"{'':44}{'time':>10}{'cpu':>10}{'/ buffer':>11}{'/ memory':>11}{'anonymous':>12}{'files':>11}")
    buffer, held = (results[way][0]["cpu"] for way in ("read", "hold"))
    for way, (result, memory) in results.items():
        print(
            f"{WAYS[way]:44}{result['seconds']:8.2f} s{result['cpu']:8.2f} s"
            f"{result['cpu'] / buffer:11.1f}{result['cpu'] / held:11.1f}"
            f"{memory.anonymous:8.0f} MiB{memory.files:7.0f} MiB"
        )
    print(
        "Compared, warm cache: reading both checkpoints, into one buffer of the largest matrix's size over "
        f"and over, and into memory, a file at a time; norm and k={K} "
        "shares on both sides of every update as weightgeom streams them; the same after loading both models "
        f"with from_pretrained; and an SVD of every update, timed on {DECOMPOSED} of {matrices} matrices and "
        "scaled up. Time is the best of five, `cpu` its processor seconds, which other processes on the "
        "machine disturb less, and the next two columns the ratio of these to either reading. Memory is "
        "the peak above start-up; `files` is page cache."
    )


WAYS = {
    "read": "reading both, into one reused buffer",
    "hold": "reading both, into memory",
    "stream": "norms and projections, streamed",
    "load": "norms and projections, both models loaded",
    "svd": "SVD of every update (extrapolated)",
}


def work(way: str, directory: Path) -> None:
    """One way, several times: the first compiles kernels, and the others may be disturbed."""
    pair = directory / "before", directory / "after"
    architecture = load_architecture(pair[0])
    widths = (SHAPE["width"], SHAPE["mlp"])
    generator = torch.Generator().manual_seed(0)
    bases = {d: Subspace.random(d, K, generator).basis.float() for d in widths}
    ready()
    ways = {"read": read, "hold": hold, "stream": stream, "load": load, "svd": svd}
    runs = [ways[way](pair, architecture, bases) for _ in range(1 if way == "svd" else 5)]
    seconds, cpu = (min(times) for times in zip(*runs, strict=True))
    print(json.dumps({"seconds": seconds, "cpu": cpu}), flush=True)


def now() -> Times:
    """Seconds on the clock and of this process's processors."""
    return time.perf_counter(), time.process_time()


def since(start: Times) -> Times:
    """The two since `start`."""
    return now()[0] - start[0], now()[1] - start[1]


def read(pair: tuple[Path, Path], architecture: Architecture, bases: dict[int, torch.Tensor]) -> Times:
    """Both checkpoints, file by file into one reused buffer of the largest matrix's size."""
    buffer = bytearray(SHAPE["width"] * SHAPE["mlp"] * 4)
    start = now()
    for path in (path for place in pair for path in sorted(place.glob("*.safetensors"))):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return since(start)


def hold(pair: tuple[Path, Path], architecture: Architecture, bases: dict[int, torch.Tensor]) -> Times:
    """Both checkpoints, file by file, each into memory of its own, which is let go before the next."""
    start = now()
    for path in (path for place in pair for path in sorted(place.glob("*.safetensors"))):
        path.read_bytes()
    return since(start)


def stream(pair: tuple[Path, Path], architecture: Architecture, bases: dict[int, torch.Tensor]) -> Times:
    """The library's own way; opening the files counts."""
    start = now()
    before, after = (open_params(place, architecture) for place in pair)
    for matrix in architecture.matrices:
        d_out, d_in = matrix.of(before).shape
        projected(matrix, after, before, right=bases[d_in], left=bases[d_out])
    return since(start)


def load(pair: tuple[Path, Path], architecture: Architecture, bases: dict[int, torch.Tensor]) -> Times:
    """The way without this library: two models in memory, in fp32 where they are subtracted."""
    start = now()
    before, after = (
        dict(AutoModelForCausalLM.from_pretrained(place, dtype="auto").named_parameters()) for place in pair
    )
    with torch.no_grad():
        for matrix in architecture.matrices:
            delta = matrix.of(after).float() - matrix.of(before).float()
            delta.norm()
            (delta @ bases[delta.shape[1]]).norm()
            (bases[delta.shape[0]].T @ delta).norm()
    return since(start)


def svd(pair: tuple[Path, Path], architecture: Architecture, bases: dict[int, torch.Tensor]) -> Times:
    """Of the first matrices; the rest is extrapolated by the matrices' number, as all layers are alike."""
    before, after = (open_params(place, architecture) for place in pair)
    start = now()
    for matrix in architecture.matrices[:DECOMPOSED]:
        torch.linalg.svd(matrix.of(after).float() - matrix.of(before).float(), full_matrices=False)
    seconds, cpu = since(start)
    scale = len(architecture.matrices) / DECOMPOSED
    return seconds * scale, cpu * scale


if __name__ == "__main__":
    main()
