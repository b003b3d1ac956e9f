"""Costs of stages on this machine, measured on a small proxy of the network and scaled to its size.

On a CPU, times are those of an otherwise idle machine. Every measurement runs the stage's own code: the
objective's trainer, the probe, the intervention.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from runners.planning.live_memory import LiveMemory
from runners.planning.proxy import SMALLEST, Proxy, proxy_of
from weightgeom.compat.trainers import prepared
from weightgeom.interfaces import Intervention, Objective, Probe, Setting
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import architecture_of
from weightgeom.params import Params
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training
from weightgeom.training.fit import outdated_name_allowed
from weightgeom.training.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

WORK = 4e10  # maximal floating-point operations of a measurement: about a second on a core
TARGET_SECONDS = 1.0  # duration of a measurement on a slow or busy machine
LEAST_SHARE = 0.25  # minimal share of WORK: with fewer samples, times are too noisy
FEW_TOKENS = 128  # a batch small enough for all of its logits to be in memory at once
SAMPLE_FIELDS = ("tokens", "pairs", "prompts", "questions")  # counts in which a stage's time is linear
TIMED_ARMS = 3  # arms of an intervention that are measured


@dataclass(frozen=True)
class TrainingCost:
    """The cost of a training: seconds per step, and bytes in addition to the weights.

    `activations` is the peak memory of a step, gradients included; `saved` is the memory per token between
    the forward and the backward pass; `trained` is the size of the trained parameters, for which the
    optimizer keeps moments; `reference` is whether a copy of the weights serves as the reference.
    """

    step: float
    activations: float
    saved: float
    trained: float
    reference: bool

    def peak_memory(self, weights: float, training: Training) -> float:
        """Peak memory in bytes of each of a training's processes, for `weights` bytes of weights.

        The activations are those of a process's part of a batch. DDP averages the gradients in a copy of
        them. With `shard`, a process holds a part of the weights and moments, and the whole weights once:
        while it loads them, and the first one while it gathers a checkpoint.
        """
        copies = 1 + self.reference + (training.match == "delta_norm" and not training.shard)
        held = copies * weights + OPTIMIZERS[training.optimizer].moments * self.trained
        if training.shard:
            return held / training.processes + weights + self.activations
        buckets = self.trained if training.processes > 1 else 0.0
        return held + buckets + self.activations


@dataclass(frozen=True)
class LinearCost:
    """Seconds of a stage on the proxy: a fixed part, and a part that grows with the number of samples."""

    fixed: float
    samples: float

    def scaled(self, proxy: Proxy) -> float:
        """The seconds for the network that `proxy` represents."""
        # The fixed part consists of decompositions and products of d x d matrices.
        return proxy.layers * (self.fixed * proxy.width**3 + self.samples * proxy.width**2)


class Benchmark:
    """A random network of a proxy's config and a slightly perturbed copy, on which stages are measured."""

    def __init__(
        self,
        config: "PreTrainedConfig",
        proxy: Proxy,
        tokenizer: "PreTrainedTokenizerBase",
        examples: Examples,
        device: str,
        dtype: torch.dtype,
        threads: int = 1,
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.config, self.proxy, self.examples = config, proxy, examples
        self.device, self.dtype = device, dtype
        with torch.random.fork_rng():  # networks draw from the global generator
            torch.manual_seed(0)
            network = AutoModelForCausalLM.from_config(proxy.config, dtype=torch.float32).to(device)
            self.before: Params = {
                name: weight.detach().to(dtype) for name, weight in network.named_parameters()
            }
            self.after: Params = {
                name: weight + 0.01 * torch.randn_like(weight) for name, weight in self.before.items()
            }
        self.network = network
        self.tokenizer = tokenizer
        self.model = LanguageModel(
            network.requires_grad_(False).eval(),
            tokenizer,
            architecture_of(proxy.config),
            torch.device(device),
        )
        self.work = min(WORK, max(LEAST_SHARE * WORK, TARGET_SECONDS * _flops_per_second(device)))
        self.speedup = 1.0 if threads == 1 or device == "cuda" else self._thread_speedup(threads)
        self.multiplied = sum(weight.numel() for weight in network.parameters() if weight.ndim > 1)

    def training(self, objective: Objective, training: Training) -> TrainingCost:
        """The cost of a training with the objective's own trainer, measured on part of a batch."""
        with self._trainer(objective, training) as trainer:
            batch_tokens = _batch_tokens(trainer, training.batch_size)
            affordable = self.work / (6 * self.multiplied) / (max(batch_tokens) / training.batch_size)
            tokens, loss = _loss(objective, trainer, max(1, min(training.batch_size, int(affordable))))
            with LiveMemory() as memory:
                value = loss()
            saved = memory.now / tokens  # kept for the backward pass
            value.backward()
            parameters = [weight for weight in trainer.model.parameters() if weight.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)  # stands for all
            passes, updates = [], []
            for _ in range(2):
                start = self._now()
                loss().backward()
                passes.append(self._now() - start)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                updates.append(self._now() - start - passes[-1])
            trained = 4 * sum(weight.numel() for weight in parameters)
            reference = getattr(trainer, "ref_model", None) is not None
        layers, width, lora = self.proxy.layers, self.proxy.width, training.lora.r is not None
        batch_seconds = min(passes) / tokens * sum(batch_tokens) / len(batch_tokens)
        trained *= layers * (width if lora else width**2)
        head_gradient = 0 if lora else 4 * self.config.vocab_size * self.config.hidden_size
        head = self._head_memory(objective, training)
        activations = saved * layers * width * max(batch_tokens) + head + head_gradient
        return TrainingCost(
            layers * width**2 * (training.accumulate * batch_seconds + updates[-1]) / self.speedup,
            max(activations, trained),
            saved * layers * width,
            trained,
            reference,
        )

    def _head_memory(self, objective: Objective, training: Training) -> float:
        """Peak memory of a step in bytes without the layers' saved activations: mostly of the head.

        The head works in tiles. Its memory grows with the vocabulary and with the tokens, each up to the
        size of a tile, so it is measured on few tokens with the whole vocabulary, and on all tokens with a
        small one.
        """

        def peak(vocabulary: int, whole_batch: bool) -> float:
            with self._narrow(vocabulary)._trainer(objective, training) as trainer:
                few_rows = max(1, int(FEW_TOKENS / _tokens_per_row(trainer, training)))
                _, loss = _loss(objective, trainer, training.batch_size if whole_batch else few_rows)
                with LiveMemory() as memory:
                    value = loss()
                    saved = memory.now
                    value.backward()
                return float(memory.peak - saved)

        few_tokens = peak(SMALLEST, whole_batch=False)
        all_tokens = peak(SMALLEST, whole_batch=True)
        whole_vocabulary = peak(self.config.vocab_size, whole_batch=False)
        return whole_vocabulary * all_tokens / few_tokens

    def _narrow(self, vocabulary: int) -> "Benchmark":
        """The same benchmark on a network with one layer of the smallest width."""
        narrow = proxy_of(self.config, 1, 1, vocabulary)
        return Benchmark(self.config, narrow, self.tokenizer, self.examples, self.device, self.dtype)

    @contextmanager
    def _trainer(self, objective: Objective, training: Training) -> Iterator[Any]:
        weights = {name: weight.float().clone() for name, weight in self.before.items()}
        network = self.model.with_weights(weights)
        with TemporaryDirectory() as directory, outdated_name_allowed():
            arguments = training.arguments(Path(directory), 0, self.device)
            if training.lora.r is not None:
                arguments["peft_config"] = training.lora.config(self.model.architecture)
            yield objective.trainer(
                network.train().requires_grad_(), self.tokenizer, self.examples, arguments
            )

    def probe(
        self, probe: Probe, objective: Objective | None, training: Training, from_random: bool, count: int
    ) -> float:
        """Seconds of a probe over `count` checkpoints, of which the first is the start."""
        setting = self._setting(from_random, objective, training)

        def timings(smaller_probe: Probe) -> Iterator[float]:
            start = self._now()
            measure = smaller_probe.measurement(setting)
            for params in (self.before, self.after, self.after):
                measure(params)
                yield -start + (start := self._now())

        costs = self._linear_costs(probe, training, objective is not None, timings)
        first, second, further = (cost.scaled(self.proxy) for cost in costs)
        return (first + second + max(0, count - 2) * further) / self.speedup

    def intervention(self, intervention: Intervention, training: Training, arms: int) -> float:
        """Seconds of an intervention with `arms` arms, assumed equally costly."""
        setting = self._setting(False, None, training)

        def timings(smaller_intervention: Intervention) -> Iterator[float]:
            times = [self._now()]

            def log(metrics: Mapping[str, float], step: int) -> None:
                times.append(self._now())
                if len(times) > TIMED_ARMS:
                    raise ArmsTimed

            try:
                smaller_intervention.rows(setting, log)
            except ArmsTimed:
                pass
            yield times[1] - times[0]
            yield (times[-1] - times[1]) / max(1, len(times) - 2)

        costs = self._linear_costs(intervention, training, False, timings)
        start, arm = (cost.scaled(self.proxy) for cost in costs)
        return (start + (arms - 1) * arm) / self.speedup

    def _linear_costs(
        self,
        measurement: Any,
        training: Training,
        has_objective: bool,
        timings: Callable[[Any], Iterator[float]],
    ) -> list[LinearCost]:
        """The linear cost of each of the `timings`, from two runs on different numbers of samples."""
        measurement = proportioned(measurement, self.proxy)
        operations = 2 * self.multiplied * self._forward_tokens(measurement, training, has_objective)
        share = min(1.0, self.work / max(operations, 1.0))
        few = list(timings(shrunk(measurement, share / 3)))
        many = list(timings(shrunk(measurement, share)))
        slopes = [max(0.0, (b - a) / (share - share / 3)) for a, b in zip(few, many, strict=True)]
        return [LinearCost(max(0.0, b - share * slope), slope) for b, slope in zip(many, slopes, strict=True)]

    def _forward_tokens(self, measurement: Any, training: Training, has_objective: bool) -> float:
        """The approximate number of tokens in forward passes; those for gradients count thrice."""
        pairs = self.examples.heldout_pairs[:32]
        words = [len(f"{pair.prompt} {pair.chosen} {pair.prompt} {pair.rejected}".split()) for pair in pairs]
        pair_tokens = sum(words) / len(words) if words else 0.0
        prompt_tokens = 3 * (pair_tokens or training.max_length) if has_objective else 0.0
        each = {"tokens": 1.0, "pairs": pair_tokens, "prompts": prompt_tokens, "questions": 8.0}
        count = 0.0
        for field in fields(measurement):
            value = getattr(measurement, field.name)
            if field.name in SAMPLE_FIELDS and isinstance(value, int):
                count += each[field.name] * value
            elif is_dataclass(value):
                count += self._forward_tokens(value, training, has_objective)
        return count

    def _setting(self, from_random: bool, objective: Objective | None, training: Training) -> Setting:
        parts = self.model, self.before, self.after, from_random, self.examples, 0
        return Setting(*parts, objective, training, 1)

    def _thread_speedup(self, threads: int) -> float:
        """The speedup of a forward pass with `threads` threads over one, from the best of four times each."""
        ids = torch.zeros(4, 96, dtype=torch.long)
        best = []
        for count in (1, threads):
            torch.set_num_threads(count)
            times = []
            for _ in range(4):
                start = perf_counter()
                self.network(input_ids=ids)
                times.append(perf_counter() - start)
            best.append(min(times))
        torch.set_num_threads(1)
        return min(float(threads), max(1.0, best[0] / best[1]))

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return perf_counter()
        return process_time()  # unlike the clock's, not stretched by other processes


class ArmsTimed(Exception):
    """Ends an intervention once enough of its arms are timed."""


def shrunk(measurement: Any, share: float) -> Any:
    """A probe or intervention on that share of its samples."""

    def fewer(name: str, value: Any) -> Any:
        sampled = name in SAMPLE_FIELDS and isinstance(value, int) and value > 0
        return max(2, round(value * share)) if sampled else value

    return _changed(measurement, fewer)


def proportioned(measurement: Any, proxy: Proxy) -> Any:
    """A probe or intervention with its layers and subspace dimensions in the proportions of the proxy."""

    def smaller(name: str, value: Any) -> Any:
        if name == "layers" and value:
            return sorted({int(layer / proxy.layers) for layer in value})
        if name == "k" and value:
            sizes = sorted(
                {max(1, round(k / proxy.width)) for k in ([value] if isinstance(value, int) else value)}
            )
            return sizes[0] if isinstance(value, int) else sizes
        return value

    return _changed(measurement, smaller)


def _changed(measurement: Any, change: Callable[[str, Any], Any]) -> Any:
    """A copy with the fields, also those of fields that are dataclasses, as `change` makes them by name."""
    values = {field.name: getattr(measurement, field.name) for field in fields(measurement)}
    changed = {
        name: _changed(value, change) if is_dataclass(value) else change(name, value)
        for name, value in values.items()
    }
    return replace(measurement, **{name: value for name, value in changed.items() if value != values[name]})


def _flops_per_second(device: str) -> float:
    """Floating-point operations per second of a matrix product at present."""

    a, count, start = torch.ones(1024, 512, device=device), 0, perf_counter()
    b = torch.ones(512, 512, device=device)
    while (taken := perf_counter() - start) < 0.1 or count < 2:
        float((a @ b)[0, 0])
        count += 1
    return 2.0 * 1024 * 512 * 512 * count / taken


def _batch_tokens(trainer: Any, size: int) -> list[float]:
    """The tokens, padding included, in each of up to eight batches of a trainer."""
    data, generator = trainer.train_dataset, torch.Generator().manual_seed(0)
    order = torch.randperm(len(data), generator=generator).tolist()
    batches = [order[start : start + size] for start in range(0, min(len(order), 8 * size), size)]
    tokens = [_tokens(trainer.data_collator([data[index] for index in batch])) for batch in batches]
    return [count * size / len(batch) for count, batch in zip(tokens, batches, strict=True)]


def _tokens_per_row(trainer: Any, training: Training) -> float:
    return max(_batch_tokens(trainer, training.batch_size)) / training.batch_size


def _loss(objective: Objective, trainer: Any, rows: int) -> tuple[int, Callable[[], Tensor]]:
    """The number of tokens in a batch of `rows` rows, and the batch's loss."""
    data = trainer.train_dataset
    inputs = prepared(trainer, trainer.data_collator([data[i % len(data)] for i in range(rows)]))
    return _tokens(inputs), lambda: objective.total_loss(trainer, dict(inputs))


def _tokens(inputs: Mapping[str, Any]) -> int:
    return sum(ids.numel() for name, ids in inputs.items() if name.endswith("input_ids"))


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, log lines of the stages are suppressed, and torch uses one thread.

    On a busy machine, threads that wait for each other would stretch the times many times over.
    """
    level, threads = logging.root.manager.disable, torch.get_num_threads()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        logging.disable(level)
        torch.set_num_threads(threads)
