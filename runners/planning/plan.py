"""Plans of runs, `plan=true`: downloads, time, memory and disk space before anything starts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import torch

from runners.planning.calibration import Benchmark, TrainingCost, quiet
from runners.planning.machine import Machine, available_memory, existing, resident, write_speed
from runners.planning.overrides import override, smaller_trainings
from runners.planning.proxy import assumed, lengths_by, proxy_of, standin, standin_tokenizer
from weightgeom.bases.chain import Chain, check_chain
from weightgeom.bases.hub import CheckpointFiles, checkpoint_files
from weightgeom.bases.outline import HasOutline, Outline, Shape, peak_memory
from weightgeom.bases.pretrained import check_single
from weightgeom.data.hub import HubData
from weightgeom.interfaces import NeedsExamples, Objective, OnPolicy
from weightgeom.models.loading import check_length, parameters_of
from weightgeom.models.residual import architecture_of
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training

RUN_OVERHEAD = 64 * 2.0**20  # bytes of a run's tracking client and allocator, which a plan does not load


@dataclass(frozen=True)
class PlannedStage:
    """The cost of a stage: seconds, peak memory, and lasting and temporary disk space, all in bytes."""

    name: str
    work: str  # such as `64 steps`
    seconds: float
    memory: float
    disk: float = 0.0
    temporary_disk: float = 0.0
    remedy: str | None = None  # overrides with which the stage fits into memory


@dataclass(frozen=True)
class Plan:
    """The plan of a job: its model, the model's files, and its stages by keys that jobs may share."""

    model: str
    parameters: int
    files: Sequence[CheckpointFiles]
    stages: Mapping[str, PlannedStage]
    notes: Sequence[str] = ()


@dataclass
class Planner:
    """Makes plans; measurements that several jobs share are made once."""

    outputs: Path
    device: str
    parallel: int = 1  # jobs that run at a time
    memory: float | None = None  # bytes for each job; None: an equal share of this machine's free memory
    nodes: int = 1  # of each job, over which the processes of a training are spread
    threads: int = field(default_factory=torch.get_num_threads)
    cache: dict[str, Any] = field(default_factory=dict)

    def plan(self, parts: Mapping[str, Any], config: Mapping[str, Any]) -> Plan:
        """The plan of a job, from its objects and the configuration that describes them.

        Raises:
            ValueError: if the run would be refused.
            FileNotFoundError: if the model cannot be found.
        """
        job = _Job(self, parts, config)
        with quiet():
            return job.plan()

    def once(self, key: str, make: Any) -> Any:
        """The result of `make`, computed once per key."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    @property
    def machine(self) -> Machine:
        """The resources of this machine, read before the first measurement."""

        def read() -> Machine:
            # The libraries that a run loads before its first stage.
            from trl import DPOTrainer, SFTTrainer  # noqa: F401 (heavy)

            import weightgeom.figures  # noqa: F401 (heavy)

            own = resident()
            free = self.memory
            if free is None:
                free = available_memory(self.device) + (own if self.device == "cpu" else 0)
                free /= self.parallel
            return Machine(free, own + RUN_OVERHEAD, write_speed(existing(self.outputs)), process_time())

        return self.once("machine", read)


class _Job:
    """One job and its measurements."""

    def __init__(self, planner: Planner, parts: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self.planner, self.config = planner, config
        self.machine = planner.machine
        self.model, self.data, self.device = parts["model"], parts["data"], parts["device"]
        self.objective: Objective | None = parts["objective"]
        self.training: Training = parts["training"]
        self.probes, self.interventions = parts["probes"], parts["interventions"]
        alone = parts.get("worker") is not None  # a job that is one worker
        self.workers = 1 if alone else min(parts.get("workers", 1), planner.threads)
        self.base = _config_key(config, "model", "data")
        self.seed = json.dumps(parts["seed"])

    def plan(self) -> Plan:
        """The plan of the whole job."""
        if not isinstance(self.model, HasOutline):
            raise ValueError(f"there is no plan for {type(self.model).__name__}: run it without plan=true")
        if isinstance(self.objective, OnPolicy) and self.objective.on_policy:
            raise ValueError(
                "there is no plan for an objective whose completions the policy samples: run it without"
                " plan=true, with few training.steps first"
            )
        self.examples, notes = self.planner.once(_config_key(self.config, "data"), self._examples)
        self.outline: Outline = self.planner.once(
            self.base, partial(self.model.outline, self.examples, self.data)
        )
        self._check()
        outline = self.outline
        files = [
            self.planner.once(
                f"files {location}",
                partial(
                    checkpoint_files,
                    location,
                    outline.allow_bin,
                    outline.trust_remote_code,
                    outline.cache,
                ),
            )
            for location in dict.fromkeys(outline.locations.values())
        ]
        self.parameters = parameters_of(outline.config)
        self.weights = 4.0 * self.parameters
        stages = dict(self._stages(sum(checkpoint.weights for checkpoint in files)))
        return Plan(outline.config.model_type, self.parameters, files, stages, notes)

    def _examples(self) -> tuple[Examples, list[str]]:
        if isinstance(self.data, HubData):
            length = self.training.max_length
            note = f"{self.data.name} is not read: {self.data.number} examples of {length} tokens are assumed"
            return assumed(self.data.name, self.data.number, length), [note]
        return self.data.examples(), []

    def _check(self) -> None:
        if isinstance(self.model, Chain):
            declarations = {name: probe.declaration for name, probe in self.probes.items()}
            check_chain(self.model, declarations, [*self.interventions])
        architecture = architecture_of(self.outline.config)
        if self.objective is not None:
            if not isinstance(self.data, HubData):
                self.objective.check(self.examples)
                self.training.check(self.examples)
            self.training.lora.check(architecture)
            context = getattr(self.outline.config, "max_position_embeddings", None)
            check_length(self.training.max_length, context)
        elif not self.outline.steps:
            check_single({name: probe.declaration for name, probe in self.probes.items()}, self.interventions)
        for measurement in (*self.probes.values(), *self.interventions.values()):
            measurement.check(architecture)
            if isinstance(measurement, NeedsExamples):
                measurement.check_examples(self.examples)

    def _stages(self, stored: float) -> Iterator[tuple[str, PlannedStage]]:
        pretraining, trajectory = self.outline.pretraining, self.base
        # The figures and the tracking at the end take about as long as the start.
        ends = PlannedStage("start and end", "", 2 * self.machine.start, self.machine.baseline)
        yield f"start {json.dumps(self.config, default=str)}", ends
        if pretraining is not None:
            objective, training, text = pretraining.objective, pretraining.training, pretraining.text
            fit = partial(self._training_stage, "pretraining", objective, training, text, True)
            yield f"pretraining {self.base}", self.planner.once(f"pretraining {self.base}", fit)
        if steps := self.outline.steps or ([0] if self.objective is None else []):
            suffix, from_random = "" if self.objective is None else "_pretraining", pretraining is not None
            yield from self._probe_stages(suffix, trajectory, steps, None, from_random, stored)
        for number in range(self.outline.pairs):
            for key, stage in self._probe_stages("_stages", trajectory, [0, 1], None, False, stored):
                yield f"{key} {number}", stage
        if self.objective is not None:
            trajectory = _config_key(self.config, "model", "data", "objective", "training")
            objective, saved = self.objective, self.training.save_steps()
            fit = partial(self._training_stage, "training", objective, self.training, self.examples, False)
            key = f"training {trajectory} {self.seed}"
            yield key, self.planner.once(f"training {trajectory}", fit)
            yield from self._probe_stages("", trajectory, saved, objective, False, stored)
        architecture = architecture_of(self.outline.config)
        for name, intervention in self.interventions.items():
            key = f"{name} {trajectory} {json.dumps(self.config['intervention'][name])}"
            arms = intervention.arms(architecture)
            benchmark = self._benchmark(self.examples)
            measure = partial(benchmark.intervention, intervention, self.training, arms)
            seconds = self.planner.once(key, measure)
            yield key + self.seed, self._stage(name, f"{arms} arms", seconds, intervention, False)

    def _training_stage(
        self, name: str, objective: Objective, training: Training, text: Examples, from_random: bool
    ) -> PlannedStage:
        here = -(-training.processes // self.planner.nodes)  # processes on a node
        benchmark = self._benchmark(text, max(1, self.planner.threads // here))

        def cost_of(other: Training) -> TrainingCost:
            """That of one process, on its part of every batch."""
            part = replace(other, batch_size=other.batch_size // other.processes, processes=1, shard=False)
            return benchmark.training(objective, part)

        def memory(other: Training, cost: TrainingCost) -> float:
            """The memory of a node's processes and of the run's own, or of a GPU, of which each has one."""
            peak = self.machine.baseline + cost.peak_memory(self.weights, other)
            several = other.processes > 1 and self.device != "cuda"
            return self.machine.baseline + here * peak if several else peak

        cost = cost_of(training)
        if name == "training":
            self.planner.cache[f"cost {self._training_key()}"] = cost
        kept, states = training.checkpoints_size(self.weights, cost.trained, from_random)
        waiting = 1.0 if self.device == "cuda" else max(1.0, here / self.planner.threads)
        seconds = training.steps * cost.step * waiting + kept / self.machine.write_speed
        peak = memory(training, cost)
        remedy = None
        if peak > self.machine.memory:
            key = "training" if name == "training" else "model.pretraining"
            fitting = (
                overrides
                for overrides, smaller in smaller_trainings(key, training, from_random, self.config)
                if self._fits(memory(smaller, cost_of(smaller)))
            )
            remedy = next(fitting, None) or self._smaller_model()
        several = f", {training.processes} processes" if training.processes > 1 else ""
        work = f"{training.steps} steps{several}"
        return PlannedStage(name, work, seconds, peak, kept, states, remedy)

    def _training_key(self) -> str:
        return _config_key(self.config, "model", "data", "objective", "training")

    def _fits(self, memory: float) -> bool:
        return memory <= self.machine.memory

    def _probe_stages(
        self,
        suffix: str,
        trajectory: str,
        steps: Sequence[int],
        objective: Objective | None,
        from_random: bool,
        stored: float,
    ) -> Iterator[tuple[str, PlannedStage]]:
        benchmark, count = self._benchmark(self.examples), len(steps)
        for name, probe in self.probes.items():
            key = f"{name}{suffix} {trajectory} {json.dumps(self.config['probe'][name])}"
            measure = partial(benchmark.probe, probe, objective, self.training, from_random, count)
            seconds = self.planner.once(key, measure)
            if stored > self.machine.memory:  # the disk is read twice: for activations and for the update
                seconds += 2 * stored / self.machine.write_speed
            work = f"{count} checkpoints" if count > 1 else "1 checkpoint"
            has_objective = objective is not None
            stage = self._stage(name + suffix, work, seconds, probe, has_objective, max(1, count - 1))
            yield key + self.seed, stage

    def _stage(
        self, name: str, work: str, seconds: float, thing: Any, objective: bool, compared: int = 1
    ) -> PlannedStage:
        """The stage of a probe or intervention `thing`, with its memory and, if it does not fit, a remedy."""

        def memory(thing: Any) -> float:
            shape = replace(self._shape(), compared=compared)
            each = self.machine.baseline + peak_memory(thing, shape, objective)
            workers = min(self.workers, compared) if kind == "probe" else 1
            return each if workers == 1 else self.machine.baseline + workers * each

        kind, members = (
            ("probe", self.probes) if thing in self.probes.values() else ("intervention", self.interventions)
        )
        remedy = None
        if not self._fits(memory(thing)):
            own_name = next(member for member, other in members.items() if other is thing)
            fitting = (
                override(f"{kind}.{own_name}.{key}", value, self.config)
                for key, value in (
                    *(("budget_gb", 2.0**power) for power in range(7, -4, -1) if "budget_gb" in vars(thing)),
                    *(("length", length) for length in (48, 24) if "length" in vars(thing)),
                )
                if self._fits(memory(replace(thing, **{key: value})))
            )
            rest = ",".join(member for member in members if member != own_name)
            remedy = next(fitting, None) or f"{kind}=[{rest}], which leaves it out"
        return PlannedStage(name, work, seconds, memory(thing), remedy=remedy)

    def _smaller_model(self) -> str | None:
        return "a smaller model.size" if "size" in self.config["model"] else None

    def _shape(self) -> Shape:
        config, architecture = self.outline.config, architecture_of(self.outline.config)
        cost: TrainingCost | None = self.planner.cache.get(f"cost {self._training_key()}")
        pairs = self.examples.heldout_pairs[:96]
        length = lengths_by(self.outline.tokenizer)
        texts = (str(pair.prompt) + str(side) for pair in pairs for side in (pair.chosen, pair.rejected))
        longest = max(map(length, texts), default=0)
        return Shape(
            d_model=architecture.d_model,
            layers=architecture.n_layers,
            vocabulary=config.vocab_size,
            parallel=architecture.parallel,
            parameters=self.parameters,
            saved=0.0 if cost is None else cost.saved,
            reference=cost is not None and cost.reference,
            longest=longest if pairs else self.training.max_length,
            mixture=bool(architecture.stacks),
            adapted=self.training.lora.r is not None,
        )

    def _benchmark(self, examples: Examples, threads: int | None = None) -> Benchmark:
        """The stages' benchmark on these examples, on all threads unless some are given."""
        threads = self.planner.threads if threads is None else threads

        def make() -> Benchmark:
            config = self.outline.config
            dtype: torch.dtype = getattr(config, "dtype", None) or torch.float32
            text = standin(examples, lengths_by(self.outline.tokenizer))
            return Benchmark(config, proxy_of(config), standin_tokenizer(), text, self.device, dtype, threads)

        return self.planner.once(f"benchmark {self.base} {examples.name} {examples.digest} {threads}", make)


def _config_key(config: Mapping[str, Any], *parts: str) -> str:
    return json.dumps([config[part] for part in parts] + [config["device"]], sort_keys=True, default=str)
