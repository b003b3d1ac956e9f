"""What stages cost here, measured in seconds on a proxy of the network and brought to its size.

On a CPU these are the seconds of a machine that does nothing else.
Every measurement runs the stage's own code: the objective's trainer, the probe, the intervention.
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

from runners.planning.live_memory import Live
from runners.planning.proxy import SMALLEST, Proxy, proxy_of
from weightgeom.compat.trainers import prepared
from weightgeom.interfaces import Intervention, Objective, Probe, Setting
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import architecture_of
from weightgeom.params import Params
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training
from weightgeom.training.fit import outdated_name_allowed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

WORK = 4e10  # floating-point operations of one measurement at most: about a second on a core
SECOND = 1.0  # and what it is to take on a slow or a busy machine
LEAST = 0.25  # of that work in any case: of fewer samples nothing can be told
FEW = 128  # tokens of a batch whose logits are all held
SAMPLES = ("tokens", "pairs", "prompts", "questions")  # fields whose number a stage's time is linear in
ARMS = 3  # of an intervention, after which it has shown what an arm takes


@dataclass(frozen=True)
class TrainingCost:
    """What a training takes: seconds a step, and bytes beside the weights.

    `activations` is the highest that lives in a step, gradients included, and `saved` what a forward pass
    leaves for each token; `trained` is what the optimizer keeps two moments of; `reference` says that a copy
    of the weights stands beside.
    """

    step: float
    activations: float
    saved: float
    trained: float
    reference: bool

    def held(self, weights: float, training: Training) -> float:
        """Bytes in memory at its highest, of a network with so many bytes of weights."""
        copies = 1 + self.reference + (training.match == "delta_norm")
        return copies * weights + 2 * self.trained + self.activations


@dataclass(frozen=True)
class Linear:
    """Seconds of a stage: `fixed`, and of the samples that it is made on."""

    fixed: float
    samples: float

    def at(self, proxy: Proxy) -> float:
        """The seconds of the network that a proxy stands for."""
        # What does not depend on samples is decomposing and multiplying d x d matrices.
        return proxy.layers * (self.fixed * proxy.width**3 + self.samples * proxy.width**2)


class Bench:
    """A random network of a proxy's config, moved a little, on which stages are measured."""

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
            self.before: Params = {n: one.detach().to(dtype) for n, one in network.named_parameters()}
            self.after: Params = {n: one + 0.01 * torch.randn_like(one) for n, one in self.before.items()}
        self.network = network
        self.tokenizer = tokenizer
        self.model = LanguageModel(
            network.requires_grad_(False).eval(),
            tokenizer,
            architecture_of(proxy.config),
            torch.device(device),
        )
        self.work = min(WORK, max(LEAST * WORK, SECOND * _speed(device)))
        self.speedup = 1.0 if threads == 1 or device == "cuda" else self._faster(threads)
        self.multiplied = sum(one.numel() for one in network.parameters() if one.ndim > 1)

    def training(self, objective: Objective, training: Training) -> TrainingCost:
        """One training, by the objective's own trainer, on as many rows as are soon computed."""
        with self._trainer(objective, training) as trainer:
            whole = _batches(trainer, training.batch_size)
            room = self.work / (6 * self.multiplied) / (max(whole) / training.batch_size)
            tokens, loss = _loss(objective, trainer, max(1, min(training.batch_size, int(room))))
            with Live() as live:
                found = loss()
            saved = live.now / tokens  # what the backward pass waits for
            found.backward()
            parameters = [one for one in trainer.model.parameters() if one.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
            passes, updates = [], []
            for _ in range(2):
                start = self._now()
                loss().backward()
                passes.append(self._now() - start)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                updates.append(self._now() - start - passes[-1])
            trained = 4 * sum(one.numel() for one in parameters)
            reference = getattr(trainer, "ref_model", None) is not None
        layers, width, lora = self.proxy.layers, self.proxy.width, training.lora.r is not None
        each = min(passes) / tokens * sum(whole) / len(whole)  # seconds of a batch
        trained *= layers * (width if lora else width**2)
        head = 0 if lora else 4 * self.config.vocab_size * self.config.hidden_size
        passing = saved * layers * width * max(whole) + self._head(objective, training) + head
        return TrainingCost(
            layers * width**2 * (training.accumulate * each + updates[-1]) / self.speedup,
            max(passing, trained),
            saved * layers * width,
            trained,
            reference,
        )

    def _head(self, objective: Objective, training: Training) -> float:
        """Bytes that live in a step beside what its layers save, most of them of the head: it works in tiles.

        They grow with the vocabulary and with the tokens, with either up to the size of a tile: on one of a
        few tokens with the whole vocabulary, and on all tokens with a small one.
        """

        def peak(vocabulary: int, whole: bool) -> tuple[int, float]:
            with self._narrow(vocabulary)._trainer(objective, training) as trainer:
                rows = training.batch_size if whole else max(1, int(FEW / _row(trainer, training)))
                tokens, loss = _loss(objective, trainer, rows)
                with Live() as live:
                    found = loss()
                    saved = live.now
                    found.backward()
                return tokens, float(live.peak - saved)

        _, of_few = peak(SMALLEST, False)
        _, of_all = peak(SMALLEST, True)
        _, wide = peak(self.config.vocab_size, False)
        return wide * of_all / of_few

    def _narrow(self, vocabulary: int) -> "Bench":
        """The same with a network of one layer as narrow as can be."""
        narrow = proxy_of(self.config, 1, 1, vocabulary)
        return Bench(self.config, narrow, self.tokenizer, self.examples, self.device, self.dtype)

    @contextmanager
    def _trainer(self, objective: Objective, training: Training) -> Iterator[Any]:
        network = self.model.with_weights({name: one.float().clone() for name, one in self.before.items()})
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

        def calls(some: Probe) -> Iterator[float]:
            start = self._now()
            measure = some.measurement(setting)
            for params in (self.before, self.after, self.after):
                measure(params)
                yield -start + (start := self._now())

        first, second, next_ = (
            one.at(self.proxy) for one in self._linear(probe, training, objective is not None, calls)
        )
        return (first + second + max(0, count - 2) * next_) / self.speedup

    def intervention(self, intervention: Intervention, training: Training, arms: int) -> float:
        """Seconds of an intervention of so many arms, all taken to be as costly as the first."""
        setting = self._setting(False, None, training)

        def calls(some: Intervention) -> Iterator[float]:
            times = [self._now()]

            def log(metrics: Mapping[str, float], step: int) -> None:
                times.append(self._now())
                if len(times) > ARMS:
                    raise Shown

            try:
                some.rows(setting, log)
            except Shown:
                pass
            yield times[1] - times[0]
            yield (times[-1] - times[1]) / max(1, len(times) - 2)

        start, arm = (one.at(self.proxy) for one in self._linear(intervention, training, False, calls))
        return (start + (arms - 1) * arm) / self.speedup

    def _linear(
        self, thing: Any, training: Training, known: bool, calls: Callable[[Any], Iterator[float]]
    ) -> list[Linear]:
        """Each of the times that `calls` gives, split by two runs on different numbers of samples."""
        passes = 2 * self.multiplied * self._samples(thing, training, known)
        share = min(1.0, self.work / max(passes, 1.0))
        few = list(calls(shrunk(thing, share / 3)))
        many = list(calls(shrunk(thing, share)))
        slopes = [max(0.0, (b - a) / (share - share / 3)) for a, b in zip(few, many, strict=True)]
        return [Linear(max(0.0, b - share * slope), slope) for b, slope in zip(many, slopes, strict=True)]

    def _samples(self, thing: Any, training: Training, known: bool) -> float:
        """Tokens that pass forward, about; `known` says that there is an objective to take gradients of."""
        pairs = self.examples.heldout_pairs[:32]
        words = [len(f"{one.prompt} {one.chosen} {one.prompt} {one.rejected}".split()) for one in pairs]
        pair = sum(words) / len(words) if words else 0.0
        prompt = 3 * (pair or training.max_length) if known else 0.0
        each = {"tokens": 1.0, "pairs": pair, "prompts": prompt, "questions": 8.0}
        count = 0.0
        for field in fields(thing):
            value = getattr(thing, field.name)
            if field.name in SAMPLES and isinstance(value, int):
                count += each[field.name] * value
            elif is_dataclass(value):
                count += self._samples(value, training, known)
        return count

    def _setting(self, from_random: bool, objective: Objective | None, training: Training) -> Setting:
        parts = self.model, self.before, self.after, from_random, self.examples, 0
        return Setting(*parts, objective, training, 1)

    def _faster(self, threads: int) -> float:
        """How many times faster a forward pass is on so many threads than on one, each at its best."""
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
        return process_time()  # of one thread, which others on the machine do not stretch


class Shown(Exception):
    """Ends an intervention when it has shown what an arm takes."""


def shrunk(thing: Any, share: float) -> Any:
    """A probe or intervention on that share of its samples."""
    new = {}
    for field in fields(thing):
        value = getattr(thing, field.name)
        if field.name in SAMPLES and isinstance(value, int) and value > 0:
            new[field.name] = max(2, round(value * share))
        elif is_dataclass(value):
            new[field.name] = shrunk(value, share)
    return replace(thing, **new)


def _speed(device: str) -> float:
    """Floating-point operations a second of a matrix product, now."""
    a, count, start = torch.ones(1024, 512, device=device), 0, perf_counter()
    b = torch.ones(512, 512, device=device)
    while (taken := perf_counter() - start) < 0.1 or count < 2:
        float((a @ b)[0, 0])
        count += 1
    return 2.0 * 1024 * 512 * 512 * count / taken


def _batches(trainer: Any, size: int) -> list[float]:
    """Tokens, padding included, of some batches of a trainer."""
    order = torch.randperm(len(trainer.train_dataset), generator=torch.Generator().manual_seed(0)).tolist()
    some = [order[start : start + size] for start in range(0, min(len(order), 8 * size), size)]
    found = [
        (_tokens(trainer.data_collator([trainer.train_dataset[i] for i in one])), len(one)) for one in some
    ]
    return [tokens * size / rows for tokens, rows in found]


def _row(trainer: Any, training: Training) -> float:
    return max(_batches(trainer, training.batch_size)) / training.batch_size


def _loss(objective: Objective, trainer: Any, rows: int) -> tuple[int, Callable[[], Tensor]]:
    """The tokens of a batch of so many rows, and its loss."""
    data = trainer.train_dataset
    inputs = prepared(trainer, trainer.data_collator([data[i % len(data)] for i in range(rows)]))
    return _tokens(inputs), lambda: objective.total_loss(trainer, dict(inputs))


def _tokens(inputs: Mapping[str, Any]) -> int:
    return sum(one.numel() for name, one in inputs.items() if name.endswith("input_ids"))


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, nothing of what the stages say is shown, and torch has one thread.

    Several that wait for each other on a busy machine would take many times as long.
    """
    level, threads = logging.root.manager.disable, torch.get_num_threads()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        logging.disable(level)
        torch.set_num_threads(threads)
