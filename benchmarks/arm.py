"""Cost of an arm of an intervention, over that of a forward pass of all that it is evaluated on.

    .venv/bin/python benchmarks/arm.py

One matrix of one layer is edited, and all effects are measured by `Evaluation.change`; the forward pass is
`LanguageModel.logits` of the same batches, without any effect. Random weights, on one thread, the two in
turn: least processor times of `--repeats`. The GPT-NeoX is the embedded world's model.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from material import llama
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedConfig

from weightgeom.causal.effects import Effects, Evaluation
from weightgeom.data.world import World
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import ResidualMatrix, architecture_of

WORLD = World(documents=200, pairs=200)
EFFECTS = Effects()


def main() -> None:
    """Measure both models, print a table each and the highest ratio of the upper half of the layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = WORLD.tokenizer()
    neox = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        bos_token_id=1,
        eos_token_id=1,
    )
    measure("GPT-NeoX", neox, tokenizer, range(4), options.repeats)
    measure("Llama", llama(64, 176, 12, 4, len(tokenizer)), tokenizer, (0, 3, 6, 9, 11), options.repeats)


def measure(name: str, config: PreTrainedConfig, tokenizer, chosen: Sequence[int], repeats: int) -> None:
    """One model: the ratios by kind in some of its layers."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model = LanguageModel(network, tokenizer, architecture_of(config))
    evaluation = Evaluation(model, dict(network.named_parameters()), WORLD.examples(), EFFECTS)

    def whole() -> None:
        for part in evaluation.parts:
            model.logits(evaluation.params, part.batch)

    kinds = list(dict.fromkeys(matrix.kind for matrix in model.architecture.matrices))
    layers = model.architecture.n_layers
    tokens = sum(int(part.batch.attention_mask.sum()) for part in evaluation.parts)
    shown = Table("layer", *kinds, title=f"{name}, {layers} layers, {tokens} tokens: arm / forward pass")
    upper = 0.0
    for layer in chosen:
        ratios = []
        for matrix in (matrix for matrix in model.architecture.matrices if matrix.layer == layer):
            arm, forward = in_turn(arm_of(evaluation, matrix), whole, repeats)
            ratios.append((kinds.index(matrix.kind), arm / forward))
        values = [value for _, value in sorted(ratios)]
        upper = max([upper, *values]) if 2 * layer >= layers else upper
        shown.add_row(str(layer), *(f"{value:.2f}" for value in values))
    Console().print(shown)
    Console().print(
        f"{name}: at most {upper:.2f} of a forward pass in these layers from {(layers + 1) // 2} on"
    )


def arm_of(evaluation: Evaluation, matrix: ResidualMatrix) -> Callable[[], object]:
    """All effects of one edit of a matrix."""
    weight = matrix.of(evaluation.params)
    edited = matrix.replaced(evaluation.params, weight + 0.01 * torch.randn(weight.shape))
    return lambda: evaluation.change(edited)


def in_turn(arm: Callable[[], object], comparison: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Least processor seconds of each, after one call of each that warms up."""
    least = [float("inf"), float("inf")]
    for repeat in range(repeats + 1):
        for place, call in enumerate((arm, comparison)):
            start = time.process_time()
            call()
            if repeat:
                least[place] = min(least[place], time.process_time() - start)
    return least[0], least[1]


if __name__ == "__main__":
    main()
