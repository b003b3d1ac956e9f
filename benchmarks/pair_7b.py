"""Memory of the probe `rsf`, whole, on a pair of Llama-2-7B's shape: activations, updates, nulls.

python benchmarks/pair_7b.py [--layers 4]
"""

import argparse
import json
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
    parser.add_argument("--work")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.work:
        ready()
        print(json.dumps(measure(Path(options.work))), flush=True)
        return
    with TemporaryDirectory(dir=options.directory) as directory:
        generate(Path(directory), options.layers)
        size = sum(path.stat().st_size for path in (Path(directory) / "before").glob("*.safetensors"))
        result, memory = measured(__file__, directory)
    anonymous = memory.peak["RssAnon"]
    print(
        f"{result['matrices']:.0f} updates of a pair of Llama-2-7B's shape with {options.layers} layers "
        f"({size / 1e9:.1f} GB each, bfloat16, sharded), by the probe rsf on one "
        f"thread: {result['seconds']:.0f} s; peak anonymous memory {anonymous:.0f} MiB, of which "
        f"{memory.anonymous:.0f} MiB above start-up; mapped file pages, which the kernel takes back at "
        f"will, {memory.files:.0f} MiB"
    )


def generate(directory: Path, layers: int) -> tuple[Path, Path]:
    """The pair `before` and `after`, with config and tokenizer."""
    config = llama(width=4096, mlp=11008, layers=layers, heads=32, vocabulary=32000)
    return write_pair(directory, config, torch.bfloat16)


def measure(directory: Path) -> dict[str, float]:
    """The probe `rsf`, whole, under a budget: weights and text module by module, moments in passes."""
    start = time.perf_counter()
    model = load(directory / "before", "cpu")
    before, after = (model.params(directory / name) for name in ("before", "after"))
    examples = World(documents=10, heldout=100).examples()
    probe = RSF(tokens=512, resamples=0, budget_gb=0.5)
    rows = probe.measurement(Setting(model, before, after, False, examples, 0))(after)
    ratios = [row["value"] for row in rows if row["quantity"] == "ratio" and row["subspace"] != "random"]
    return {"seconds": time.perf_counter() - start, "matrices": len(ratios)}


if __name__ == "__main__":
    main()
