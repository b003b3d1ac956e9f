"""Cost of the probe `rsf`, whole, over that of its passes and one reading of the checkpoints.

    .venv/bin/python benchmarks/rsf_cost.py
    .venv/bin/python benchmarks/rsf_cost.py --layers 4 --profile

On a random network of SmolLM2-135M's shape (`--layers` cuts it) and one checkpoint, whose update is Gaussian,
on one thread: all nulls, p-values, intervals, matched levels under DPO, and rows of random subspaces. The
passes are forward over the held-out text (the body alone), and forward and backward of the objective, whose
graph starts at the first layer, with nothing accumulated. The reading takes every byte of both files once.
Processor times; memory is anonymous, to which the weights, mapped from their files, do not belong.
"""

# pyright: reportAttributeAccessIssue=false

import argparse
import cProfile
import json
import pstats
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from material import measured, ready
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from weightgeom.data.world import World
from weightgeom.estimators.gradients import sampled
from weightgeom.estimators.lm_head import slice_head
from weightgeom.estimators.reference_subspaces import BATCH_TOKENS, most_tokens
from weightgeom.geometry.gram import Products
from weightgeom.interfaces import Setting
from weightgeom.models.loading import load
from weightgeom.objectives.dpo import DPO
from weightgeom.probes.rsf import RSF
from weightgeom.text.tokens import packed
from weightgeom.training.config import Training
from weightgeom.training.fit import outdated_name_allowed

WORLD = World(documents=10, heldout=3000, pairs=400)
PROBE = RSF()
EPSILON = 0.0005  # sd of the update's entries; that of the weights is 0.02


def main() -> None:
    """Make the pair, measure passes and probe in a process each, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="also profile the probe")
    parser.add_argument("--work", nargs=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.work:
        way, directory = options.work
        WAYS[way](Path(directory))
        return
    threads = "--threads", str(options.threads)
    with TemporaryDirectory() as directory:
        make(Path(directory), options.layers)
        passes, alone = measured(__file__, "passes", directory, *threads)
        probe, whole = measured(__file__, "probe", directory, *threads)
        if options.profile:
            profiled(Path(directory))
    shown = Table("", "seconds", "anonymous MiB above start-up")
    for part, seconds in passes.items():
        shown.add_row(part, f"{seconds:.1f}", "")
    least = sum(passes.values())
    weights = probe.pop("weights")
    shown.add_row("passes and reading", f"{least:.1f}", f"{alone.anonymous:.0f}")
    shown.add_row("probe", f"{probe['seconds']:.1f}", f"{whole.anonymous:.0f}")
    Console().print(shown)
    Console().print(
        f"the probe takes {probe['seconds'] / least:.2f} times its passes and one reading;"
        f" {probe['rows']:.0f} rows; weights {weights:.0f} MiB"
    )


def make(directory: Path, layers: int) -> None:
    """A random model of SmolLM2-135M's shape, before and after a random update."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=1,
    )
    network = LlamaForCausalLM(shape)
    for name in ("before", "after"):
        network.save_pretrained(directory / name)
        WORLD.tokenizer().save_pretrained(directory / name)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim == 2:
                    parameter += EPSILON * torch.randn_like(parameter)


def passes(directory: Path) -> None:
    """Only the passes, and a reading of both files."""
    model = load(directory / "before", "cpu")
    training, examples = Training(), WORLD.examples()
    weights = model.hold(model.params(directory / "before"))
    size = BATCH_TOKENS[True] // PROBE.length
    tokens = most_tokens(model.architecture.d_model)
    batches = packed(examples.heldout, model.tokenizer, PROBE.length, tokens, size)
    ready()
    seconds = {}
    start = time.process_time()
    with Products():
        for batch in batches:
            model.logits(weights, batch, keep=1)
    seconds["forward, held-out text"] = time.process_time() - start
    network = model.with_weights(weights).requires_grad_(False).eval()
    del weights
    with TemporaryDirectory() as place:
        arguments = training.arguments(Path(place), 0, "cpu") | {"per_device_eval_batch_size": 8}
        kept = sampled(examples, PROBE.prompts, training.max_length, 0)
        trainer = DPO().trainer(network, model.tokenizer, kept, arguments)
        slice_head(trainer, network)
        first = next(matrix for matrix in model.architecture.matrices if matrix.role == "write")
        network.get_submodule(first.module).register_forward_hook(_start)
        data = trainer.train_dataset.shuffle(seed=0).select(range(PROBE.prompts))
        start = time.process_time()
        with outdated_name_allowed():
            for inputs in trainer.get_eval_dataloader(data):
                DPO().total_loss(trainer, inputs).backward()
        seconds["forward and backward, objective"] = time.process_time() - start
    start = time.process_time()
    for name in ("before", "after"):
        with safe_open(directory / name / "model.safetensors", "pt") as file:
            for key in file.keys():
                file.get_tensor(key).sum()
    seconds["reading"] = time.process_time() - start
    print(json.dumps(seconds))


def _start(module, inputs, output):
    return output if output.requires_grad or not torch.is_grad_enabled() else output.detach().requires_grad_()


def probe(directory: Path) -> None:
    """The whole probe."""
    measure, after, weights = _measurement(directory)
    ready()
    start = time.process_time()
    rows = measure(after)
    seconds = time.process_time() - start
    print(json.dumps({"seconds": seconds, "rows": len(rows), "weights": weights}))


def profiled(directory: Path) -> None:
    """Where the probe's time goes."""
    measure, after, _ = _measurement(directory)
    with cProfile.Profile() as profile:
        measure(after)
    pstats.Stats(profile).sort_stats("cumulative").print_stats(70)


def _measurement(directory: Path):
    model = load(directory / "before", "cpu")
    before, after = model.params(directory / "before"), model.params(directory / "after")
    setting = Setting(model, before, after, False, WORLD.examples(), 0, DPO(), Training())
    size = sum(weight.nbytes for weight in model.hold(before).values()) / 2**20
    return PROBE.measurement(setting), after, size


WAYS = {"passes": passes, "probe": probe}

if __name__ == "__main__":
    main()
