"""The read-side and write-side RSF of a whole update, end to end, against the script that one would write.

    .venv/bin/python benchmarks/read_rsf.py

On a random model of Pythia-70m's shape and 16,384 tokens, on one thread, both after loading. The script
runs the network with hooks that keep every attention and MLP input, then takes `np.cov`,
`np.linalg.eigh`, the SVD of the unembedding and of every update, and the fractions. Ours is the probe
`rsf` with its nulls, p-values and matched levels, without and with its bootstrap over prompts.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from material import measured, ready
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from weightgeom.data.world import World
from weightgeom.interfaces import Setting
from weightgeom.models.loading import load
from weightgeom.probes.rsf import RSF
from weightgeom.text.tokens import packed

SHAPE = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048}
LENGTH = 512  # tokens a sequence
WORLD = World(documents=10, heldout=3000)


def main() -> None:
    """Make the pair, measure each way in a process of its own, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", nargs=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.work:
        way, directory, tokens = options.work
        WAYS[way](Path(directory), int(tokens))
        return
    shown = Table("tokens", "way", "seconds", "anonymous MiB", "resident MiB", "time", "memory")
    with TemporaryDirectory() as directory:
        make(Path(directory))
        for tokens in options.tokens:
            measured_by = {}
            for way in WAYS:
                arguments = way, directory, str(tokens), "--threads", str(options.threads)
                result, memory = measured(__file__, *arguments)
                whole = memory.peak["RssAnon"] + memory.peak["RssFile"]
                measured_by[way] = result["seconds"], whole
                seconds, resident = measured_by["script"]
                shown.add_row(
                    *(
                        str(tokens),
                        way,
                        f"{result['seconds']:.2f}",
                        f"{memory.peak['RssAnon']:.0f}",
                        f"{whole:.0f}",
                    ),
                    *(f"{seconds / result['seconds']:.2f}x", f"{whole / resident:.2f}"),
                )
    Console().print(shown)
    Console().print("time: how many times faster than the script; memory: peak resident over the script's")


def make(directory: Path) -> None:
    """A random model of Pythia-70m's shape, before and after a random update."""
    torch.manual_seed(0)
    network = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50_304, bos_token_id=1, eos_token_id=1, **SHAPE))
    for name in ("before", "after"):
        network.save_pretrained(directory / name)
        WORLD.tokenizer().save_pretrained(directory / name)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim == 2:
                    parameter += 0.001 * torch.randn_like(parameter)


def ours(directory: Path, tokens: int, resamples: int = 0) -> None:
    """The probe."""
    examples = WORLD.examples()
    model = load(directory / "before", "cpu")
    before, after = model.params(directory / "before"), model.params(directory / "after")
    probe = RSF(tokens=tokens, length=LENGTH, resamples=resamples, prompts=0)
    ready()
    start = time.perf_counter()
    rows = probe.measurement(Setting(model, before, after, False, examples, 0))(after)
    seconds = time.perf_counter() - start
    ratios = {f"L{row['layer']}.{row['matrix']}": row["value"] for row in rows if _own_ratio(row)}
    print(json.dumps({"seconds": seconds, "ratios": ratios}))


def _own_ratio(row: dict) -> bool:
    return row["quantity"] == "ratio" and row["subspace"] != "random"


def script(directory: Path, tokens: int) -> None:
    """The script that a user would write."""
    network = AutoModelForCausalLM.from_pretrained(directory / "before").eval()
    trained = AutoModelForCausalLM.from_pretrained(directory / "after").eval()
    batches = packed(WORLD.examples().heldout, WORLD.tokenizer(), LENGTH, tokens, size=8)
    ready()
    start = time.perf_counter()
    kept: dict[str, list[np.ndarray]] = {}
    for index, layer in enumerate(network.gpt_neox.layers):
        for name, module in (
            ("attention", layer.attention.query_key_value),
            ("mlp", layer.mlp.dense_h_to_4h),
        ):
            module.register_forward_hook(
                lambda module, inputs, output, key=f"{index}.{name}": kept.setdefault(key, []).append(
                    inputs[0].reshape(-1, inputs[0].shape[-1]).numpy()
                )
            )
    with torch.no_grad():
        for batch in batches:
            network(input_ids=batch.input_ids)
    bases = {}
    k = SHAPE["hidden_size"] // 8
    for key, parts in kept.items():
        covariance = np.cov(np.concatenate(parts).T)
        bases[key] = np.linalg.eigh(covariance)[1][:, -k:]
    unembedding = network.embed_out.weight if hasattr(network, "embed_out") else network.lm_head.weight
    prediction = np.linalg.svd(unembedding.detach().numpy(), full_matrices=False)[2][:k].T
    ratios = {}
    heads, d = SHAPE["num_attention_heads"], SHAPE["hidden_size"]
    for index, (old, new) in enumerate(zip(network.gpt_neox.layers, trained.gpt_neox.layers, strict=True)):
        fused = (new.attention.query_key_value.weight - old.attention.query_key_value.weight).detach().numpy()
        fused = fused.reshape(heads, 3, d // heads, d)
        deltas = {kind: fused[:, part].reshape(d, d) for part, kind in enumerate("qkv")}
        deltas["up"] = (new.mlp.dense_h_to_4h.weight - old.mlp.dense_h_to_4h.weight).detach().numpy()
        deltas["o"] = (new.attention.dense.weight - old.attention.dense.weight).detach().numpy()
        deltas["down"] = (new.mlp.dense_4h_to_h.weight - old.mlp.dense_4h_to_h.weight).detach().numpy()
        for kind, delta in deltas.items():
            left, values, right = np.linalg.svd(delta, full_matrices=False)
            basis = bases[f"{index}.{'mlp' if kind == 'up' else 'attention'}"]
            side = prediction.T @ left if kind in ("o", "down") else right @ basis
            weights = values[None] if kind in ("o", "down") else values[:, None]
            ratios[f"L{index}.{kind}"] = float(
                np.square(side * weights).sum() / np.square(values).sum() * d / k
            )
    print(json.dumps({"seconds": time.perf_counter() - start, "ratios": ratios}))


WAYS = {
    "script": script,
    "rsf": ours,
    "rsf with bootstrap": lambda directory, tokens: ours(directory, tokens, resamples=40),
}

if __name__ == "__main__":
    sys.exit(main())
