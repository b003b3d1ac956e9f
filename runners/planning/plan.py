"""What a run would fetch, and take of time, memory and disk, told before it starts: `plan=true`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import torch

from runners.planning.calibration import Bench, TrainingCost, quiet
from runners.planning.machine import Machine, available_memory, existing, resident, write_speed
from runners.planning.overrides import override, smaller
from runners.planning.proxy import assumed, lengths_by, proxy_of, standin, standin_tokenizer
from weightgeom.bases.chain import Chain, check_chain
from weightgeom.bases.hub import CheckpointFiles, checkpoint_files
from weightgeom.bases.outline import HasOutline, Outline, Shape, peak_memory
from weightgeom.data.hub import HubData
from weightgeom.interfaces import NeedsExamples, Objective
from weightgeom.models.loading import check_length, parameters_of
from weightgeom.models.residual import architecture_of
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training

BESIDE = 64 * 2.0**20  # the tracking client and what the allocator keeps, which a plan does not load


@dataclass(frozen=True)
class Stage:
    """One stage of a run: seconds, bytes of memory at its highest, and of disk that stay and that pass."""

    name: str
    what: str
    seconds: float
    memory: float
    disk: float = 0.0
    passing: float = 0.0
    knob: str | None = None  # what makes it fit, where it does not


@dataclass(frozen=True)
class Plan:
    """A job: its model, the files of it, and its stages by what tells them from those of other jobs."""

    model: str
    parameters: int
    files: Sequence[CheckpointFiles]
    stages: Mapping[str, Stage]
    notes: Sequence[str] = ()


@dataclass
class Planner:
    """Makes plans, measuring here what several jobs share once."""

    outputs: Path
    device: str
    parallel: int = 1  # jobs that run at a time
    memory: float | None = None  # bytes that each has; None: its part of what is free here
    threads: int = field(default_factory=torch.get_num_threads)
    known: dict[str, Any] = field(default_factory=dict)

    def plan(self, parts: Mapping[str, Any], config: Mapping[str, Any]) -> Plan:
        """The plan of a job: its objects, and the configuration that they were made of.

        Raises:
            ValueError: if something of it cannot work, as when it is run.
            FileNotFoundError: if the model is not to be had.
        """
        job = _Job(self, parts, config)
        with quiet():
            return job.plan()

    def once(self, key: str, make: Any) -> Any:
        """What `make` makes, or made before under the same key."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    @property
    def machine(self) -> Machine:
        """What this machine has, before anything is measured on it."""

        def look() -> Machine:
            # Whatever a run loads before its first stage.
            from trl import DPOTrainer, SFTTrainer  # noqa: F401 (heavy)

            import weightgeom.figures  # noqa: F401 (heavy)

            own = resident()
            free = self.memory
            if free is None:
                free = available_memory(self.device) + (own if self.device == "cpu" else 0)
                free /= self.parallel
            return Machine(free, own + BESIDE, write_speed(existing(self.outputs)), process_time())

        return self.once("machine", look)


class _Job:
    """One job on its way to a plan."""

    def __init__(self, planner: Planner, parts: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self.planner, self.config = planner, config
        self.machine = planner.machine
        self.model, self.data, self.device = parts["model"], parts["data"], parts["device"]
        self.objective: Objective | None = parts["objective"]
        self.training: Training = parts["training"]
        self.probes, self.interventions = parts["probes"], parts["interventions"]
        self.base = _key(config, "model", "data")
        self.seed = json.dumps(parts["seed"])

    def plan(self) -> Plan:
        """All of it."""
        if not isinstance(self.model, HasOutline):
            raise ValueError(f"there is no plan for {type(self.model).__name__}: run it without plan=true")
        self.examples, notes = self.planner.once(_key(self.config, "data"), self._examples)
        self.outline: Outline = self.planner.once(
            self.base, partial(self.model.outline, self.examples, self.data)
        )
        self._check()
        outline = self.outline
        files = [
            self.planner.once(
                f"files {one}", partial(checkpoint_files, one, outline.allow_bin, outline.trust_remote_code)
            )
            for one in dict.fromkeys(outline.locations.values())
        ]
        self.parameters = parameters_of(outline.config)
        self.weights = 4.0 * self.parameters
        stages = dict(self._stages(sum(one.weights for one in files)))
        return Plan(outline.config.model_type, self.parameters, files, stages, notes)

    def _examples(self) -> tuple[Examples, list[str]]:
        if isinstance(self.data, HubData):
            length = self.training.max_length
            said = f"{self.data.name} is not read: {self.data.number} examples of {length} tokens are assumed"
            return assumed(self.data.name, self.data.number, length), [said]
        return self.data.examples(), []

    def _check(self) -> None:
        if isinstance(self.model, Chain):
            check_chain([*self.probes], [*self.interventions])
        architecture = architecture_of(self.outline.config)
        if self.objective is not None:
            if not isinstance(self.data, HubData):
                self.objective.check(self.examples)
                self.training.check(self.examples)
            self.training.lora.check(architecture)
            context = getattr(self.outline.config, "max_position_embeddings", None)
            check_length(self.training.max_length, context)
        elif not self.outline.steps:
            raise ValueError(
                "objective=none on a single checkpoint leaves no update to measure: choose an objective"
            )
        for measurement in (*self.probes.values(), *self.interventions.values()):
            measurement.check(architecture)
            if isinstance(measurement, NeedsExamples):
                measurement.check_examples(self.examples)

    def _stages(self, stored: float) -> Iterator[tuple[str, Stage]]:
        past, trajectory = self.outline.pretraining, self.base
        # Behind the stages come the figures and the tracking, which take as long as the start.
        beside = Stage("start and end", "", 2 * self.machine.start, self.machine.baseline)
        yield f"start {json.dumps(self.config, default=str)}", beside
        if past is not None:
            fit = partial(self._trained, "pretraining", past.objective, past.training, past.text, True)
            yield f"pretraining {self.base}", self.planner.once(f"pretraining {self.base}", fit)
        if self.outline.steps:
            suffix = "" if self.objective is None else "_pretraining"
            yield from self._probed(suffix, trajectory, self.outline.steps, None, past is not None, stored)
        for number in range(self.outline.pairs):
            for key, stage in self._probed("_stages", trajectory, [0, 1], None, False, stored):
                yield f"{key} {number}", stage
        if self.objective is not None:
            trajectory = _key(self.config, "model", "data", "objective", "training")
            fit = partial(self._trained, "training", self.objective, self.training, self.examples, False)
            key = f"training {trajectory} {self.seed}"
            yield key, self.planner.once(f"training {trajectory}", fit)
            yield from self._probed("", trajectory, self.training.save_steps(), self.objective, False, stored)
        arms = {
            name: one.arms(architecture_of(self.outline.config)) for name, one in self.interventions.items()
        }
        for name, intervention in self.interventions.items():
            key = f"{name} {trajectory} {json.dumps(self.config['intervention'][name])}"
            bench = self._bench(self.examples)
            measure = partial(bench.intervention, intervention, self.training, arms[name])
            seconds = self.planner.once(key, measure)
            yield key + self.seed, self._held(name, f"{arms[name]} arms", seconds, intervention, False)

    def _trained(
        self, name: str, objective: Objective, training: Training, text: Examples, from_random: bool
    ) -> Stage:
        def cost(some: Training) -> TrainingCost:
            return self._bench(text).training(objective, some)

        def memory(some: Training) -> float:
            return self.machine.baseline + cost(some).held(self.weights, some)

        found = cost(training)
        if name == "training":
            self.planner.known[f"cost {self._training_key()}"] = found
        kept, states = training.checkpoints_size(self.weights, found.trained, from_random)
        seconds = training.steps * found.step + kept / self.machine.write_speed
        held = self.machine.baseline + found.held(self.weights, training)
        knob = None
        if held > self.machine.memory:
            key = "training" if name == "training" else "model.pretraining"
            fitting = (
                how
                for how, some in smaller(key, training, from_random, self.config)
                if self._fits(memory(some))
            )
            knob = next(fitting, None) or self._smaller_model()
        return Stage(name, f"{training.steps} steps", seconds, held, kept, states, knob)

    def _training_key(self) -> str:
        return _key(self.config, "model", "data", "objective", "training")

    def _fits(self, memory: float) -> bool:
        return memory <= self.machine.memory

    def _probed(
        self,
        suffix: str,
        trajectory: str,
        steps: Sequence[int],
        objective: Objective | None,
        from_random: bool,
        stored: float,
    ) -> Iterator[tuple[str, Stage]]:
        for name, probe in self.probes.items():
            key = f"{name}{suffix} {trajectory} {json.dumps(self.config['probe'][name])}"
            measure = partial(
                self._bench(self.examples).probe, probe, objective, self.training, from_random, len(steps)
            )
            seconds = self.planner.once(key, measure)
            if (
                stored > self.machine.memory
            ):  # then it is read from the disk, for the activations and the update
                seconds += 2 * stored / self.machine.write_speed
            what = f"{len(steps)} checkpoints"
            yield key + self.seed, self._held(name + suffix, what, seconds, probe, objective is not None)

    def _held(self, name: str, what: str, seconds: float, thing: Any, objective: bool) -> Stage:
        def memory(some: Any) -> float:
            return self.machine.baseline + peak_memory(some, self._shape(), objective)

        knob = None
        if not self._fits(memory(thing)):
            group, only = (
                ("probe", self.probes)
                if thing in self.probes.values()
                else ("intervention", self.interventions)
            )
            plain = next(one for one, other in only.items() if other is thing)
            fitting = (
                override(f"{group}.{plain}.{key}", value, self.config)
                for key, value in (
                    *(("budget_gb", 2.0**power) for power in range(7, -4, -1) if "budget_gb" in vars(thing)),
                    *(("length", length) for length in (48, 24) if "length" in vars(thing)),
                )
                if self._fits(memory(replace(thing, **{key: value})))
            )
            rest = ",".join(one for one in only if one != plain)
            knob = next(fitting, None) or f"{group}=[{rest}], which leaves it out"
        return Stage(name, what, seconds, memory(thing), knob=knob)

    def _smaller_model(self) -> str | None:
        return "a smaller model.size" if "size" in self.config["model"] else None

    def _shape(self) -> Shape:
        config, architecture = self.outline.config, architecture_of(self.outline.config)
        cost: TrainingCost | None = self.planner.known.get(f"cost {self._training_key()}")
        pairs = self.examples.heldout_pairs[:96]
        length = lengths_by(self.outline.tokenizer)
        longest = max(
            (length(str(one.prompt) + str(side)) for one in pairs for side in (one.chosen, one.rejected)),
            default=0,
        )
        return Shape(
            d_model=architecture.d_model,
            layers=architecture.n_layers,
            vocabulary=config.vocab_size,
            parallel=architecture.parallel,
            parameters=self.parameters,
            saved=0.0 if cost is None else cost.saved,
            reference=cost is not None and cost.reference,
            longest=longest if pairs else self.training.max_length,
        )

    def _bench(self, examples: Examples) -> Bench:
        def make() -> Bench:
            config = self.outline.config
            dtype: torch.dtype = getattr(config, "dtype", None) or torch.float32
            some = standin(examples, lengths_by(self.outline.tokenizer))
            return Bench(
                config, proxy_of(config), standin_tokenizer(), some, self.device, dtype, self.planner.threads
            )

        return self.planner.once(f"bench {self.base} {examples.name} {examples.digest}", make)


def _key(config: Mapping[str, Any], *parts: str) -> str:
    return json.dumps([config[part] for part in parts] + [config["device"]], sort_keys=True, default=str)
