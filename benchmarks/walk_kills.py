"""Kills the measurement of a chain of six revisions at random moments, and compares its end with another.

    python benchmarks/walk_kills.py DIRECTORY [KILLS] [SEED]

Each is started in the outputs of the one before, killed (SIGKILL and SIGTERM in turn) after a random share of
the time that an undisturbed measurement takes, and started again. Where one ends before its kill, the next
begins anew. Prints a line for each, and exits with 1 if tables differ from those of the undisturbed one.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from commands import RUN, ended, newest, started, tables
from material import llama
from transformers import LlamaForCausalLM

from weightgeom.data.world import World

REVISIONS = 6
SIGNALS = (signal.SIGKILL, signal.SIGTERM)


def make(directory: Path, revisions: int = REVISIONS, width: int = 128) -> dict[str, str]:
    """Checkpoints of one small network, each a Gaussian update away from the one before."""
    torch.manual_seed(0)
    config = llama(width=width, mlp=2 * width, layers=4, heads=4, vocabulary=676)
    network, places = LlamaForCausalLM(config), {}
    for revision in range(revisions):
        places[f"r{revision}"] = str(directory / f"revision-{revision}")
        network.save_pretrained(places[f"r{revision}"])
        World().tokenizer().save_pretrained(places[f"r{revision}"])
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim == 2:
                    parameter += 0.002 * torch.randn_like(parameter)
    return places


def main(directory: Path, kills: int, seed: int) -> int:
    """Print what every kill interrupted; the exit code."""
    directory.mkdir(parents=True, exist_ok=True)
    places = make(directory)
    stages = "{" + ",".join(f"{name}: {place}" for name, place in places.items()) + "}"
    settings = ["model=chain/own", f"model.stages={stages}", "objective=none", "probe=[rsf]", "device=cpu"]
    command = [*RUN, *settings, "probe.rsf.tokens=8192", "name=walk_kills"]
    ended(directory / "warm", command)  # compiles
    began = time.monotonic()
    code, out = ended(directory / "undisturbed", command)
    assert code == 0, out
    whole, expected = time.monotonic() - began, tables(newest(directory / "undisturbed"))
    draw, home, fresh, wrong, done = random.Random(seed), directory / "0", 0, 0, 0
    while done < kills:
        share = draw.random()
        process = started(home, command)
        try:
            code = process.wait(share * whole)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, SIGNALS[done % 2])
            process.communicate()
            done += 1
            kept = len(list(home.rglob("checkpoint-*.rows")))
            print(
                f"{done}: {SIGNALS[done % 2 - 1].name} after {share:.0%}, {kept} checkpoints kept", flush=True
            )
            if done < kills:
                continue
            code, out = ended(home, command)
            assert code == 0, out
        differ = code != 0 or tables(newest(home)) != expected
        wrong += differ
        print(f"an interrupted measurement has ended: {'tables differ' if differ else 'the same tables'}")
        fresh += 1
        home = directory / str(fresh)
    print(
        f"{kills} kills; {wrong} of {fresh} measurements end otherwise than the undisturbed one,"
        f" which takes {whole:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    numbers = [int(number) for number in sys.argv[2:]]
    raise SystemExit(main(Path(sys.argv[1]).absolute(), *numbers, *(20, 0)[len(numbers) :]))
