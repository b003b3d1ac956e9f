"""Second moments of activations and upstream gradients, against the bare forward pass and kronfluence.

    .venv/bin/pip install --no-deps kronfluence==1.0.1 einops==0.8.2 einconv==0.1.0 opt_einsum==3.4.0
    .venv/bin/python benchmarks/moments.py

Without the first line, whose packages would bring another torch if they were asked for theirs, the last
row is left out.

On a random model of Pythia-70m's shape, on one thread, the same tokens for all. `forward` is the body of
the network alone, without its head. `activation moments` are C_a at the inputs of q, k, v and of up in
all layers. `upstream moments` add C_delta at o and down under cross-entropy, in the same pass.
`kronfluence` fits its covariance factors with true labels on the modules that hold the same matrices.
"""

# pyright: reportMissingImports=false

import argparse
import json
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from material import measured, ready
from rich.console import Console
from rich.table import Table
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from weightgeom.data.world import World
from weightgeom.estimators.gradients import Gathering, gradient_moments
from weightgeom.estimators.moments import activation_moments
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import architecture_of
from weightgeom.objectives.ce import CE
from weightgeom.text.examples import Examples
from weightgeom.text.tokens import packed
from weightgeom.training.config import Training

SHAPE = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048}
LENGTH, BATCH = 512, 4
WORLD = World(documents=3000, heldout=2)


def main() -> None:
    """Measure each way in a process of its own, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.work:
        work(WAYS[options.work], options.tokens)
        return
    shown = Table("way", "tokens/s", "anonymous MiB", "time over forward", "tokens/s over kronfluence")
    rates = {}
    ways = [way for way in WAYS if way != "kronfluence" or find_spec("kronfluence")]
    for way in ways:
        arguments = way, "--tokens", str(options.tokens), "--threads", str(options.threads)
        result, memory = measured(__file__, *arguments)
        rates[way] = options.tokens / result["seconds"], memory.peak["RssAnon"]
    for way, (rate, peak) in rates.items():
        over = f"{rate / rates['kronfluence'][0]:.2f}" if "kronfluence" in rates else "-"
        shown.add_row(way, f"{rate:.0f}", f"{peak:.0f}", f"{rates['forward'][0] / rate:.2f}", over)
    Console().print(shown)


def network() -> LanguageModel:
    """A random model of Pythia-70m's shape with the world's tokenizer."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(vocab_size=50_304, bos_token_id=1, eos_token_id=1, **SHAPE)
    return LanguageModel(GPTNeoXForCausalLM(config).eval(), WORLD.tokenizer(), architecture_of(config))


def work(way: Callable[[LanguageModel, Examples, int], None], tokens: int) -> None:
    """Time one way, after a short run to warm up."""
    model, examples = network(), WORLD.examples()
    ready()
    way(model, examples, BATCH * LENGTH)
    start = time.perf_counter()
    way(model, examples, tokens)
    print(json.dumps({"seconds": time.perf_counter() - start}))


@torch.no_grad()
def forward(model: LanguageModel, examples: Examples, tokens: int) -> None:
    """The bare body."""
    for batch in packed(examples.text, model.tokenizer, LENGTH, tokens, BATCH):
        model.network.base_model(input_ids=batch.input_ids, use_cache=False)


def activations(model: LanguageModel, examples: Examples, tokens: int) -> None:
    """C_a at all sites."""
    weights = dict(model.network.named_parameters())
    batches = packed(examples.text, model.tokenizer, LENGTH, tokens, BATCH)
    for _ in activation_moments(model, weights, batches, model.architecture.sites):
        pass


def upstream(model: LanguageModel, examples: Examples, tokens: int) -> None:
    """C_a at all sites and C_delta at o and down, under cross-entropy."""
    gathering = Gathering(prompts=tokens // LENGTH, gradients=False, positions="all", batch_size=BATCH)
    weights = {name: weight.detach() for name, weight in model.network.named_parameters()}
    training = Training(max_length=LENGTH)
    for _ in gradient_moments(model, weights, CE("text"), training, examples, gathering, 0):
        pass


def kronfluence(model: LanguageModel, examples: Examples, tokens: int) -> None:
    """Covariance factors with true labels."""
    from tempfile import TemporaryDirectory

    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task
    from torch.nn.functional import cross_entropy

    class Language(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float()
            return cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return sorted({matrix.module for matrix in model_map.matrices})

    model_map = model.architecture
    batches = packed(examples.text, model.tokenizer, LENGTH, tokens, BATCH)
    data = [{"input_ids": ids} for batch in batches for ids in batch.input_ids if len(ids) == LENGTH]
    task = Language()
    # A fresh network each time, as it wraps the modules of the one that it is given.
    prepared = prepare_model(network().network, task)
    with TemporaryDirectory() as directory:
        analyzer = Analyzer("analysis", prepared, task, cpu=True, output_dir=directory, disable_tqdm=True)
        analyzer.fit_covariance_matrices(
            "factors",
            data,  # pyright: ignore[reportArgumentType]
            per_device_batch_size=BATCH,
            factor_args=FactorArguments(use_empirical_fisher=True),
        )


WAYS = {
    "forward": forward,
    "activation moments": activations,
    "upstream moments": upstream,
    "kronfluence": kronfluence,
}

if __name__ == "__main__":
    main()
