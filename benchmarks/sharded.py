"""Peak memory of each process of a sharded training of two, over that of the training by one process.

    python benchmarks/sharded.py DIRECTORY [LAYERS]

DPO with its reference in memory, a few steps on a random Llama of width 768 (12 layers: 86 million
parameters), from the embedded world's pairs; once in one process, once with `training.processes=2
training.shard=true`. Memory is anonymous (RssAnon). Two ratios are printed: of the peaks, and of
the peaks less the memory of a process that only imports the libraries.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from commands import RUN, environment
from material import llama
from transformers import LlamaForCausalLM

from weightgeom.data.world import World

INTERVAL = 0.02  # seconds between two looks
IMPORTS = "import torch, transformers, trl, accelerate, weightgeom.training.fit, weightgeom.objectives.dpo"
MIB = 2**20


def main(directory: Path, layers: int) -> None:
    """Print peaks and ratios."""
    directory.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.manual_seed(0)
    network = LlamaForCausalLM(llama(width=768, mlp=2048, layers=layers, heads=12, vocabulary=676))
    network.save_pretrained(directory / "base")
    World().tokenizer().save_pretrained(directory / "base")
    size = 4 * sum(parameter.numel() for parameter in network.parameters()) / MIB
    del network
    start = max(peaks(directory, [sys.executable, "-c", f"{IMPORTS}; import time; time.sleep(2)"]))
    command = [
        *RUN,
        *("model=llama", f"model.name={directory / 'base'}", "data=world", "objective=dpo", "probe=[]"),
        *("training.steps=3", "training.batch_size=4", "training.max_length=48"),
        *("device=cpu", "report=false"),
    ]
    whole = max(peaks(directory, [*command, "outputs=whole"]))
    parts = ["training.processes=2", "training.shard=true", "outputs=sharded"]
    sharded = sorted(peaks(directory, [*command, *parts]))[-2:]
    print(f"weights {size:.0f} MiB, libraries {start:.0f} MiB, one process {whole:.0f} MiB")
    print(f"two: {' and '.join(f'{peak:.0f} MiB' for peak in sharded)}")
    print(
        f"the larger of two is {max(sharded) / whole:.2f} of the whole,"
        f" and {(max(sharded) - start) / (whole - start):.2f} without the libraries"
    )


def peaks(home: Path, command: list[str]) -> list[float]:
    """The peak anonymous memory of every process of a command, in MiB."""
    with (home / "log.txt").open("a") as log:
        process = subprocess.Popen(command, cwd=home, env=environment(), stdout=log, stderr=log)
    most: dict[int, float] = {}
    while process.poll() is None:
        try:
            children = psutil.Process(process.pid).children(recursive=True)
        except psutil.Error:
            break
        for pid in [process.pid, *(child.pid for child in children)]:
            most[pid] = max(most.get(pid, 0.0), anonymous(pid))
        time.sleep(INTERVAL)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: see {home / 'log.txt'}")
    return list(most.values())


def anonymous(pid: int) -> float:
    """RssAnon in MiB; 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *(int(number) for number in (sys.argv[2:] or ["12"])))
