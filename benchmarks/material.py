"""Shared by the benchmarks: pairs of random Llama-shaped checkpoints, and the memory of a process."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from weightgeom.data.world import World


def llama(width: int, mlp: int, layers: int, heads: int, vocabulary: int) -> LlamaConfig:
    """A configuration of Llama's architecture, with the special tokens of the world's tokenizer."""
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        bos_token_id=1,
        eos_token_id=1,
    )


def write_pair(directory: Path, config: LlamaConfig, dtype: torch.dtype) -> tuple[Path, Path]:
    """Two sharded checkpoints with the world's tokenizer, `before` and `after`, that differ in all layers.

    Weights are Gaussian of sd 0.02, the update of their matrices of sd 0.0005. What is outside the
    layers is equal and stored once, by hard links.
    """
    pair = directory / "before", directory / "after"
    generator = torch.Generator().manual_seed(0)
    for place in pair:
        place.mkdir()
        config.dtype = dtype
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(place)
        World().tokenizer().save_pretrained(place)
    index: dict[str, str] = {}
    size = 0
    for number, shapes in enumerate(_shards(config)):
        shard = f"model-{number:05d}-of-{config.num_hidden_layers:05d}.safetensors"
        index |= dict.fromkeys(shapes, shard)
        before = {name: _noise(shape, dtype, generator) for name, shape in shapes.items()}
        size += sum(tensor.nbytes for tensor in before.values())
        save_file(before, pair[0] / shard, {"format": "pt"})
        if number == 0:
            os.link(pair[0] / shard, pair[1] / shard)
            continue
        for tensor in before.values():
            if tensor.ndim == 2:
                tensor.add_(_noise(tensor.shape, dtype, generator), alpha=0.025)
        save_file(before, pair[1] / shard, {"format": "pt"})
    table = {"metadata": {"total_size": size}, "weight_map": index}
    for place in pair:
        (place / "model.safetensors.index.json").write_text(json.dumps(table))
    return pair


def _shards(config: LlamaConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    width, mlp, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    outside = {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width)}
    yield outside | {"model.norm.weight": (width,)}
    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}"
        attention = {f"{block}.self_attn.{kind}_proj.weight": (width, width) for kind in "qkvo"}
        into = {f"{block}.mlp.{kind}_proj.weight": (mlp, width) for kind in ("gate", "up")}
        norms = {
            f"{block}.{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")
        }
        yield attention | into | {f"{block}.mlp.down_proj.weight": (width, mlp)} | norms


def _noise(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(*shape, dtype=dtype)
    return torch.empty(*shape).normal_(0, 0.02, generator=generator).to(dtype)


@dataclass
class Memory:
    """A process's resident memory in MiB, anonymous and of files, at `start` and at its highest since.

    Sampled from /proc every 5 ms, by the parent, so that the process itself is not slowed down.
    """

    start: dict[str, float] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)

    @property
    def anonymous(self) -> float:
        """The peak of RssAnon above its start, in MiB."""
        return self.peak["RssAnon"] - self.start["RssAnon"]

    @property
    def files(self) -> float:
        """The peak of RssFile above its start, in MiB: page cache that the kernel takes back at will."""
        return self.peak["RssFile"] - self.start["RssFile"]


def measured(script: str, *arguments: str) -> tuple[dict[str, float], Memory]:
    """Run `script --work ...` and watch it between its lines `ready` and the JSON that it prints last.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    process = subprocess.Popen(
        [sys.executable, script, "--work", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    memory, done = Memory(), threading.Event()
    line = process.stdout.readline()
    if line.strip() == "ready":
        memory.start = memory.peak = _resident(process.pid)
        watcher = threading.Thread(target=_watch, args=(process.pid, memory, done))
        watcher.start()
        process.stdin.write("go\n")
        process.stdin.flush()
        line = process.stdout.readline()
        done.set()
        watcher.join()
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return json.loads(line), memory


def ready() -> None:
    """Tell the parent that imports are done, and wait for it to note the memory."""
    print("ready", flush=True)
    sys.stdin.readline()


def _watch(pid: int, memory: Memory, done: threading.Event) -> None:
    while not done.wait(0.005):
        now = _resident(pid)
        memory.peak = {kind: max(memory.peak[kind], now.get(kind, 0)) for kind in memory.peak}


def _resident(pid: int) -> dict[str, float]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = (line.split() for line in lines if line.startswith(("RssAnon", "RssFile")))
    return {name.rstrip(":"): int(size) / 1024 for name, size, _ in pairs}
