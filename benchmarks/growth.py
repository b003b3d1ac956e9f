"""Growth of the activation moments with tokens, layers and width: time, memory, the eigen step's share.

    .venv/bin/python benchmarks/growth.py [--widths 512 1024 2048 4096]

Random models of Pythia's shape, on one thread, each in a process of its own: the moments of all attention
and MLP inputs, then the top d/8 directions of each. The last columns are relative to the row's first case:
time should grow as tokens and as layers, memory not with tokens.
"""

import argparse
import json
import time

import torch
from material import measured, ready
from rich.console import Console
from rich.table import Table
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from weightgeom.data.world import World
from weightgeom.estimators.moments import activation_moments
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import architecture_of
from weightgeom.text.tokens import packed

WORLD = World(documents=10, heldout=3000)
LENGTH = 512
Case = tuple[int, int, int]  # tokens, layers, width


def main() -> None:
    """Measure each case in a process of its own, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", nargs=3, type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.work:
        tokens, layers, width = options.work
        work(tokens, layers, width)
        return
    rows: dict[str, list[Case]] = {
        "tokens": [(tokens, 6, 512) for tokens in (4096, 8192, 16_384, 32_768)],
        "layers": [(8192, layers, 512) for layers in (3, 6, 12, 24)],
        "width": [(2048, 2, width) for width in options.widths],
    }
    shown = Table(
        "over", "tokens", "layers", "d", "moments, s", "eigen step", "above start, MiB", "time", "memory"
    )
    for name, cases in rows.items():
        first = None
        for case in cases:
            result, memory = measured(__file__, *map(str, case), "--threads", str(options.threads))
            now = result["moments"], memory.anonymous
            first = first or now
            share = result["eigen"] / (result["eigen"] + result["moments"])
            shown.add_row(
                *(name, *map(str, case), f"{now[0]:.2f}", f"{share:.0%}", f"{now[1]:.0f}"),
                *(f"{now[0] / first[0]:.2f}x", f"{now[1] / first[1]:.2f}x"),
            )
    Console().print(shown)


def work(tokens: int, layers: int, width: int) -> None:
    """One case."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=1024,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = LanguageModel(GPTNeoXForCausalLM(config).eval(), WORLD.tokenizer(), architecture_of(config))
    weights = {name: weight.detach() for name, weight in model.network.named_parameters()}
    batches = packed(WORLD.examples().heldout, model.tokenizer, LENGTH, tokens, 4)
    list(activation_moments(model, weights, batches[:1], model.architecture.sites[:1]))  # to warm up
    ready()
    start, eigen = time.perf_counter(), 0.0
    for _, moment in activation_moments(model, weights, batches, model.architecture.sites):
        before = time.perf_counter()
        moment.top(width // 8)
        eigen += time.perf_counter() - before
    print(json.dumps({"moments": time.perf_counter() - start - eigen, "eigen": eigen}))


if __name__ == "__main__":
    main()
