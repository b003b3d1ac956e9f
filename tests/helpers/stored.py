"""Checkpoints on disk and in a hub cache, for tests that read them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import small
import torch
from safetensors.torch import load_file, save_file

OFFLINE = {"HF_HUB_OFFLINE": "1"}


def checkpoint(directory: Path, seed: int = 0) -> Path:
    tokenizer = small.WORLD.tokenizer()
    small.network(tokenizer, seed).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def no_stage(name: str, specification: Mapping[str, object], work: Callable, steps: int) -> Path:
    raise AssertionError("nothing is made")


def hub_cache(root: Path, name: str, revisions: dict[str, int]) -> Path:
    """The layout of the hub's cache: snapshots by commit, and refs that name them."""
    repository = root / "hub" / f"models--{name.replace('/', '--')}"
    for revision, seed in revisions.items():
        commit = f"{seed:040x}"
        checkpoint(repository / "snapshots" / commit, seed)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return repository


def fetched(locations: list[str], home: Path, environment: dict[str, str]) -> list[str]:
    """The answer of `fetch` to each location, in a process whose hub cache lies in `home`."""
    script = (
        "import json, sys\n"
        "from weightgeom.bases.hub import fetch\n"
        "def answer(location):\n"
        "    try: return str(fetch(location))\n"
        "    except FileNotFoundError as error: return f'refused: {error}'\n"
        "print(json.dumps([answer(location) for location in sys.argv[1:]]))"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", script, *locations],
        env={**clean, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def changed(directory: Path, target: Path, **config: object) -> dict[str, torch.Tensor]:
    """Copy a checkpoint, with another config; its weights, to be changed and saved."""
    target.mkdir()
    for path in directory.glob("*.json"):
        (target / path.name).write_bytes(path.read_bytes())
    stored = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(stored | config))
    return load_file(directory / "model.safetensors")


def resized(directory: Path, target: Path, by: int) -> Path:
    """A checkpoint with `by` more rows of embeddings than another (fewer, if negative), all else moved."""
    weights = changed(directory, target)
    for name, weight in weights.items():
        rows = len(weight) + by if name in (EMBED, HEAD) else len(weight)
        weight = torch.cat([weight, torch.full((max(0, by), *weight.shape[1:]), 7.0)])[:rows]
        weights[name] = weight + 0.5
    vocabulary = len(weights[EMBED])
    config = json.loads((target / "config.json").read_text()) | {"vocab_size": vocabulary}
    (target / "config.json").write_text(json.dumps(config))
    save_file(weights, target / "model.safetensors")
    return target
