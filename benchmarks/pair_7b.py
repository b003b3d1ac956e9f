"""Memory and bytes read of the probe `rsf`, whole, on a pair of Llama-2-7B's shape.

python benchmarks/pair_7b.py [--layers 4] [--resamples 0]

Activations, updates, nulls, p-values and, unless there are no resamples, intervals. The files are dropped
from the page cache first, so that every byte that the process needs is read from disk and counted.
"""

import argparse
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from material import llama, measured, ready, write_pair

from weightgeom.data.world import World
from weightgeom.interfaces import Setting
from weightgeom.models.loading import load
from weightgeom.probes.rsf import RSF


def main() -> None:
    """Generate the pair under --directory (27 GB for 32 layers), measure it, delete it, print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument(
        "--directory", type=Path, help="where there is room; by default the system's temporary"
    )
    parser.add_argument("--resamples", type=int, default=RSF.resamples)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--work")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.work:
        ready()
        print(json.dumps(measure(Path(options.work), options.tokens, options.resamples)), flush=True)
        return
    with TemporaryDirectory(dir=options.directory) as directory:
        generate(Path(directory), options.layers)
        files = list(Path(directory).glob("*/*.safetensors"))
        size = sum(path.stat().st_size for path in files)
        for path in files:
            drop(path)
        numbers = "--tokens", str(options.tokens), "--resamples", str(options.resamples)
        result, memory = measured(__file__, directory, *numbers)
    anonymous = memory.peak["RssAnon"]
    print(
        f"{result['matrices']:.0f} updates of a pair of Llama-2-7B's shape with {options.layers} layers "
        f"({size / 2e9:.1f} GB each, bfloat16, sharded), by the probe rsf on one thread, {options.tokens} "
        f"tokens, {options.resamples} resamples: {result['seconds']:.0f} s of processor time; "
        f"{result['read'] / 1e9:.2f} GB read from disk, {result['read'] / size:.3f} times both files; "
        f"peak anonymous memory {anonymous:.0f} MiB, of which "
        f"{memory.anonymous:.0f} MiB above start-up; mapped file pages, which the kernel takes back at "
        f"will, {memory.files:.0f} MiB"
    )


def generate(directory: Path, layers: int) -> tuple[Path, Path]:
    """The pair `before` and `after`, with config and tokenizer."""
    config = llama(width=4096, mlp=11008, layers=layers, heads=32, vocabulary=32000)
    return write_pair(directory, config, torch.bfloat16)


def drop(path: Path) -> None:
    """Drop a file's pages from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read() -> int:
    """Bytes that this process has made the kernel read from disk."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def measure(directory: Path, tokens: int, resamples: int) -> dict[str, float]:
    """The probe `rsf`, whole, under a budget: weights and text module by module, moments in passes."""
    start, before_all = time.process_time(), bytes_read()
    model = load(directory / "before", "cpu")
    before, after = (model.params(directory / name) for name in ("before", "after"))
    examples = World(documents=10, heldout=tokens // 8).examples()
    probe = RSF(tokens=tokens, resamples=resamples, budget_gb=0.5)
    rows = probe.measurement(Setting(model, before, after, False, examples, 0))(after)
    ratios = [row["value"] for row in rows if row["quantity"] == "ratio" and row["subspace"] != "random"]
    seconds, read = time.process_time() - start, bytes_read() - before_all
    return {"seconds": seconds, "read": read, "matrices": len(ratios)}


if __name__ == "__main__":
    main()
