"""Memory and time as `plan=true` foretells them, against those that the run then takes.

    .venv/bin/python benchmarks/plan.py [--shapes world pythia pair] [--steps 600]

Three shapes: the main job; Pythia-70m's shape, trained on text by cross-entropy; and a pair of Llama's
shape, 1024 wide, sharded and in bfloat16. On one thread, each in a process of its own. Memory is the highest
resident set of the process, mapped files included, on both sides; time is processor time, which other work
on the machine does not stretch as much, and is given with the time on the clock. With fewer --steps the
main job's pretraining is shorter.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from material import llama, write_pair
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from runners.compose import parts
from runners.planning.plan import Planner
from weightgeom.data.world import World

ROOT = Path(__file__).parents[1]
PYTHIA: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
}
SHAPES = {
    "world": ["model.pretraining.steps={steps}"],
    "pythia": [
        *("model=pythia", "model.name={home}/pythia", "data=text", "data.train={home}/text.txt"),
        *("objective=ce", "training.steps=4"),
    ],
    "pair": [
        *("model=pair", "model.before={home}/before", "model.after={home}/after", "objective=none"),
        *("data=text", "data.train={home}/text.txt"),
    ],
}


def main() -> None:
    """Plan and run each shape, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--work", nargs="+")
    options = parser.parse_args()
    if options.work:
        print(json.dumps(foretold(options.work)), flush=True)
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    shown = Table("shape", "", "foretold", "real", "foretold / real")
    with TemporaryDirectory() as home:
        make(Path(home), options.shapes)
        for shape in options.shapes:
            asked = [override.format(home=home, steps=options.steps) for override in SHAPES[shape]]
            plan = json.loads(_lines(sys.executable, __file__, "--work", *asked)[-1])
            measured = real(asked, Path(home))
            for name, unit, scale in (("memory", "GB", 1e9), ("seconds", "s", 1.0)):
                expected, taken = plan[name] / scale, measured[name] / scale
                row = f"{name}, {unit}", f"{expected:.3g}", f"{taken:.3g}", f"{expected / taken:.2f}"
                shown.add_row(shape if name == "memory" else "", *row)
            shown.add_row("", "on the clock, s", "", f"{measured['clock']:.0f}", "")
            shown.add_row("", "the plan itself, s", "", f"{plan['own']:.0f}", "")
            Console(width=100).print(shown)


def make(home: Path, shapes: list[str]) -> None:
    """The checkpoints and the text."""
    world = World()
    (home / "text.txt").write_text("\n\n".join(world.examples().text[:6000]))
    if "pythia" in shapes:
        torch.manual_seed(0)
        config = GPTNeoXConfig(vocab_size=50_304, bos_token_id=1, eos_token_id=1, **PYTHIA)
        GPTNeoXForCausalLM(config).save_pretrained(home / "pythia")
        world.tokenizer().save_pretrained(home / "pythia")
    if "pair" in shapes:
        config = llama(width=1024, mlp=2816, layers=8, heads=16, vocabulary=32_000)
        write_pair(home, config, torch.bfloat16)


def foretold(asked: list[str]) -> dict[str, float]:
    """The highest memory in bytes and all seconds of the plan, and the seconds that it took."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", [*asked, "device=cpu"])
    objects, plain = parts(config), OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    start = perf_counter()
    planner = Planner(Path("outputs").resolve(), "cpu")
    stages = planner.plan(objects, {str(key): value for key, value in plain.items()}).stages.values()
    return {
        "memory": max(stage.memory for stage in stages),
        "seconds": sum(stage.seconds for stage in stages),
        "own": perf_counter() - start,
    }


def real(asked: list[str], home: Path) -> dict[str, float]:
    """The same of the run."""
    start = perf_counter()
    with TemporaryDirectory(dir=home) as place:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *asked, "device=cpu"],
            cwd=place,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
    if status:
        raise SystemExit(f"the run of {' '.join(asked)} failed")
    return {
        "memory": 1024.0 * usage.ru_maxrss,
        "seconds": usage.ru_utime + usage.ru_stime,
        "clock": perf_counter() - start,
    }


def _lines(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()


if __name__ == "__main__":
    main()
