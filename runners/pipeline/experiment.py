"""One run: prepare the base, train, probe every checkpoint, draw, and keep a record."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from runners.disk import full_disk_explained, share_with_group
from runners.modules import modules_of
from runners.pipeline.declarations import (
    check_declarations,
    objective_tags,
    warn_of_uninformative,
    with_declaration,
)
from runners.pipeline.fingerprint import code_behind, contents, package
from runners.pipeline.foresight import PRETRAINING, against, foreseen
from runners.pipeline.logged_stages import Stages, warn_if_memorised
from runners.pipeline.measurements import Measured, map_of, module, plain
from runners.pipeline.pieces import foreseen_of, measure_here, stages_of, steps_of
from runners.pipeline.progress import Foreseen, Progress, seconds_of
from runners.pipeline.store import signature
from runners.signals import Interruption, terminations_as_exceptions
from runners.summary.answer import answer
from runners.summary.commands import again, over_seeds, report
from runners.summary.curves import log_effects, log_table
from runners.summary.figures import draw
from runners.summary.note import run_note
from runners.summary.start import data_line, foreseen_lines, say
from runners.summary.terminal import End, print_summary
from runners.summary.warned import warnings
from runners.tracking.provenance import environment, provenance, uncommitted_diff
from runners.tracking.publisher import Publisher
from runners.tracking.record import Record
from runners.tracking.redaction import redacted_yaml
from runners.tracking.stores import check_experiment, check_tracking_uri
from weightgeom.analysis.chain import BETWEEN, ENDS, SINGLE, STAGES, between, side_by_side
from weightgeom.analysis.declared import ROLE, UNDECLARED, plain_name
from weightgeom.analysis.referee import REFEREE, Claim, updates, verdicts
from weightgeom.bases.chain import Chain, check_chain
from weightgeom.bases.pretrained import Pretrained, check_single
from weightgeom.bases.remote import temporary_directories
from weightgeom.interfaces import (
    Data,
    Intervention,
    Log,
    Model,
    NeedsExamples,
    Objective,
    Probe,
    Stage,
    WithinBatch,
)
from weightgeom.interruption import Request, no_request
from weightgeom.models.byte_ranges import traffic
from weightgeom.table import apart
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training
from weightgeom.trajectory import Base, Trajectory

if TYPE_CHECKING:
    import pandas as pd


log = logging.getLogger(__name__)
REPOSITORY = Path(__file__).parents[2]


class Make(Protocol):
    """A maker of stages, whose metrics go into the record under `prefix`."""

    def __call__(self, prefix: str, code: str, of: str = "") -> Stage:
        """`code` is a fingerprint; `of` stands behind the names of the stages where people read them."""
        ...


@dataclass(frozen=True)
class Experiment:
    """All parts of one run; `directory` gets its record, `outputs` the stages that other runs reuse."""

    name: str  # of the MLflow experiment
    run_name: str
    seed: int
    device: str  # cpu or cuda
    outputs: Path
    directory: Path
    tracking_uri: str
    model: Model
    data: Data
    objective: Objective | None
    training: Training
    probes: Mapping[str, Probe]
    interventions: Mapping[str, Intervention]
    params: Mapping[str, object]
    tags: Mapping[str, object]
    config: str  # the resolved configuration, in YAML
    parent: Path | None = None  # the record of the sweep
    interruption: Interruption | None = None  # of a job under a scheduler
    verify: bool = False  # read all files of finished stages before they are used
    trained_on: str | None = None  # the device of the base and the training, if it is another one
    claims: Sequence[Claim] = ()  # of papers, which the referee judges by the tables
    workers: int = 1  # that share the checkpoints of each trajectory
    worker: int | None = None  # the one that this run is, which makes its piece and no tables

    def train(self) -> None:
        """Make the base and the training, and leave the rest to a later `run` in the same record."""
        with temporary_directories():
            self._train()

    def run(self) -> "dict[str, pd.DataFrame]":
        """Check all parts, make the stages that are missing, and return the tables by name."""
        with temporary_directories():
            return self._run()

    def _train(self) -> None:
        examples = self.check()
        uri = check_tracking_uri(self.tracking_uri)
        with full_disk_explained(self.directory):
            record = self._record(uri, examples)
        progress = Progress(self.outputs)
        with self._terminations(), Publisher(record.directory, uri), record:
            make, base = self._based(record, examples, progress)
            if self.objective is not None:
                self.trained(make, base, self.objective, examples)
            record.pause()
            say(["the training is done; a second job measures it"])

    def _run(self) -> "dict[str, pd.DataFrame]":
        before = traffic()
        examples = self.check()
        share_with_group(self.outputs)  # a job does not begin where the command line does
        uri = check_tracking_uri(self.tracking_uri)
        with full_disk_explained(self.directory):
            record = self._record(uri, examples)
        progress = Progress(self.outputs)
        with self._terminations(), Publisher(record.directory, uri), record:
            if objective_tags(self.objective, examples).get(ROLE) == UNDECLARED:
                log.warning(
                    "the claims leave this run out, as %s declares no role: give it the properties role"
                    " (contrast, likelihood or other) and of_text",
                    type(self.objective).__name__,
                )
            if self.objective is not None:
                warn_of_uninformative(self.probes, self.training)
            try:
                tables = self._tables(record, examples, progress)
            except (KeyboardInterrupt, SystemExit):
                say(progress.interrupted("" if self.parent else again()))
                raise
            if self.worker is not None:
                record.tag("piece", f"{self.worker + 1} of {self.workers}")
                whole = "without probe.worker, the same command makes the tables of all pieces"
                done = f"piece {self.worker + 1} of {self.workers} is measured; {whole}"
                say([done, f"record: {record.directory}"])
                return {}
            if self.claims:
                role = objective_tags(self.objective, examples).get(ROLE, "")
                tables[REFEREE] = verdicts(self.claims, updates(tables, self.params, role))
            with full_disk_explained(record.directory):
                for name, table in self._parts(tables):
                    table.to_parquet(record.artifact(f"tables/{name}.parquet"))
                    table.to_csv(record.artifact(f"tables/{name}.csv"), index=False)
                draw(tables, record, self.probes, self.interventions)
            sentence = answer(tables, {name: probe.declaration for name, probe in self.probes.items()})
            record.tag("mlflow.note.content", run_note(sentence, warnings()))
            fetched = traffic().since(before)
            if fetched.requests:
                record.update(tags={f"fetched_{name}": count for name, count in fetched._asdict().items()})
        end = End(sentence, warnings(), record.directory, uri, self._next(uri), fetched)
        print_summary(tables, self.probes, self.interventions, end)
        return tables

    def _parts(self, tables: "dict[str, pd.DataFrame]") -> "Iterator[tuple[str, pd.DataFrame]]":
        """The tables as they are kept: means over matrices, and other parameters, in ones of their own."""
        for name, table in tables.items():
            probe = self.probes.get(plain_name(name))
            if probe is None or "layer" not in table:
                yield name, table
                continue
            for suffix, part in apart(table, probe.declaration.headline).items():
                yield f"{name}{suffix}", part

    def _next(self, uri: str) -> str:
        """A command to try next: the same over seeds, or without a training the report; none in a sweep."""
        if self.parent is not None:
            return ""
        return report(self.name, self.outputs, uri) if self.objective is None else over_seeds()

    def check(self) -> Examples:
        """Refuse everything that cannot work before anything expensive starts; read the data."""
        check_parts(
            self.model,
            self.objective,
            self.training,
            self.probes,
            self.interventions,
            self.tracking_uri,
            self.name,
        )
        if self.worker is not None and (self.objective is not None or self.interventions):
            what = "intervention=[]" if self.interventions else "objective=none"
            raise ValueError(
                f"probe.worker={self.worker} measures a piece of finished checkpoints: set {what}"
            )
        examples = self.data.examples()
        if self.objective is not None:
            self.objective.check(examples)
            self.training.check(examples)
            if self.device == "cuda" and self.trained_on is None:
                from weightgeom.training.processes import check_gpus

                check_gpus(self.training.processes)
        if (self.probes or self.interventions) and not examples.heldout:
            raise ValueError(f"{examples.name} has no held-out text to probe on: give some with data.heldout")
        for measurement in (*self.probes.values(), *self.interventions.values()):
            if isinstance(measurement, NeedsExamples):
                measurement.check_examples(examples)
        return examples

    def _terminations(self) -> AbstractContextManager[None]:
        survives = self.interruption is not None and self.interruption.survive
        return terminations_as_exceptions(survives)

    def _record(self, uri: str, examples: Examples) -> Record:
        data = {
            "name": examples.name,
            "digest": examples.digest[:32],
            "source": str(self.params["data"]),
            "context": "all",
        }
        about = objective_tags(self.objective, examples)
        record = Record.create(
            self.directory / "record",
            experiment=self.name,
            name=self.run_name,
            params=self.params,
            tags={
                **provenance(REPOSITORY),
                "code_fingerprint": package(*self._modules),
                **about,
                **self.tags,
            },
            inputs=[data],  # pyright: ignore[reportArgumentType]
            tracking_uri=uri,
            parent=self.parent,
        )
        record.artifact("config.yaml").write_text(redacted_yaml(self.config))
        record.artifact("environment.txt").write_text(environment())
        if diff := uncommitted_diff(REPOSITORY):
            record.artifact("code/uncommitted.diff").write_text(diff)
        return record

    def _tables(self, record: Record, examples: Examples, progress: Progress) -> "dict[str, pd.DataFrame]":
        make, base = self._based(record, examples, progress)
        if self.worker is not None:
            return self._piece(make, base, examples, self.worker)
        tables, measured = {}, None
        trajectories = self.trajectories(make, base, examples)
        if self.workers > 1:
            trajectories = list(trajectories)
            measure_here(self, base, trajectories, examples)
        for trajectory, identity in trajectories:
            of = self.suffix(trajectory, base)
            measured = self.measured(make, base, trajectory, identity, examples, of)
            suffix = "_pretraining" if of else ""
            for name, probe in self.probes.items():
                table = measured.table(name, probe, self._pieces(trajectory))
                tables[name + suffix] = self._about(name, trajectory, table)
                log_table(record, name, suffix, tables[name + suffix], probe.declaration)
                if trajectory is base.trajectory and trajectory.from_random:
                    warn_if_memorised(base.directory.parent, tables[name + suffix])
        if base.trajectory is not None and base.pairs:
            names = enumerate(base.trajectory.stages)  # for who sees a curve by step
            record.tag(STAGES, ", ".join(f"{step} {stage}" for step, stage in names))
            for name, table in self._between_stages(make, base, examples):
                tables[name + BETWEEN] = self._about(name, base.trajectory, table)
                log_table(record, name, BETWEEN, table, self.probes[name].declaration)
            headlines = {
                name: probe.declaration.headline
                for name, probe in self.probes.items()
                if probe.declaration.compares and probe.declaration.generic and probe.declaration.headline
            }
            if headlines:
                tables[STAGES] = side_by_side(tables, headlines)
        for name, intervention in self.interventions.items():
            assert measured is not None  # some trajectory there is: a model without one is refused
            table = measured.effects(name, intervention)  # of the last one
            tables[name] = with_declaration(table, intervention)
            if len(table):
                log_effects(record, name, table, intervention.declaration)
        return tables

    def _piece(self, make: Make, base: Base, examples: Examples, number: int) -> "dict[str, pd.DataFrame]":
        """The stages of one worker; no tables."""
        trajectories = list(self.trajectories(make, base, examples))
        for make_stage in stages_of(self, make, base, trajectories, examples, number):
            make_stage()
        return {}

    def _pieces(self, trajectory: Trajectory) -> list[list[int]]:
        """The steps of every worker with some; none where one process measures all."""
        if self.workers == 1:
            return []
        steps = list(trajectory.steps)
        return list(filter(None, (steps_of(steps, number, self.workers) for number in range(self.workers))))

    def _based(self, record: Record, examples: Examples, progress: Progress) -> tuple[Make, Base]:
        """The maker of stages, and the base."""
        progress.stages, ready = self._foreseen(examples)
        self._tell(progress, examples)
        make = partial(self._stages, record, progress)
        base = ready or self.prepared(make, examples)
        if ready is None:
            progress.stages, _ = self._foreseen(examples)  # all keys hold that of the base
        return make, base

    def _about(self, name: str, trajectory: Trajectory, table: "pd.DataFrame") -> "pd.DataFrame":
        """The table with its figures' attributes: whose subspaces it is in, and the meaning of its steps."""
        at = str(self.params.get(f"probe.{name}.at"))
        automatic = "step" if trajectory.from_random else "start"
        table.attrs["at"] = automatic if at == "auto" else at
        table.attrs["trained"] = trajectory.name in ("training", "pair", "chain")  # from a base, its step 0
        if trajectory.stages:
            table.attrs[STAGES] = list(trajectory.stages)
        if trajectory.name == "checkpoint":
            table.attrs[SINGLE] = True
        if trajectory.name == "pair":
            table.attrs[ENDS] = ["before", "after"]
        return with_declaration(table, self.probes[name])

    def _between_stages(
        self, make: Make, base: Base, examples: Examples
    ) -> "Iterator[tuple[str, pd.DataFrame]]":
        """Tables of every probe that compares: each stage against the one before, as with `model=pair`."""
        names = [name for name, probe in self.probes.items() if probe.declaration.compares]
        by_probe: dict[str, list[pd.DataFrame]] = {name: [] for name in names}
        assert base.trajectory is not None
        for pair, (before, after) in zip(base.pairs, pairwise(base.trajectory.stages), strict=True):
            assert pair.trajectory is not None
            log.info("stage %s against %s, the one before it", after, before)
            of = against(before, after)
            measured = self.measured(make, pair, pair.trajectory, pair.identity, examples, of)
            measured = replace(measured, probes={name: self.probes[name] for name in names})
            for name in names:
                by_probe[name].append(measured.table(name, self.probes[name]))
        yield from ((name, between(pairs)) for name, pairs in by_probe.items())

    def trajectories(self, make: Make, base: Base, examples: Examples) -> Iterator[tuple[Trajectory, str]]:
        """The trajectories that probes measure, with their identities; a training is made by `make`."""
        if (past := self.past(base)) is not None:
            yield past, base.identity
        if self.objective is not None:
            yield self.trained(make, base, self.objective, examples)

    def past(self, base: Base) -> Trajectory | None:
        """The checkpoints that lead to the base; without an objective, the base itself if there are none."""
        alone = Trajectory("checkpoint", {0: base.directory}) if self.objective is None else None
        return base.trajectory or alone

    def suffix(self, trajectory: Trajectory, base: Base) -> str:
        """The words behind the name of a probe's stage, if it is about the past of a base that is trained."""
        return PRETRAINING if self.objective is not None and trajectory is base.trajectory else ""

    def prepared(self, make: Make, examples: Examples) -> Base:
        """The base, whose stages `make` makes."""
        stage = make("pretraining", code_behind(*modules_of(self.model)))
        return self.model.prepare(stage, examples, self.data, self._training_device, self._wanted)

    def trained(
        self, make: Make, base: Base, objective: Objective, examples: Examples
    ) -> tuple[Trajectory, str]:
        """The trajectory of the training and its identity; `make` makes its stage."""
        from weightgeom.models.loading import load_network
        from weightgeom.training.fit import fit, saved_trajectory
        from weightgeom.training.processes import fit_on_processes, load_on

        def work(directory: Path, log_metrics: Log) -> None:
            fit_on_processes(
                objective,
                partial(load_on, base.directory, self._training_device, self.training.shard),
                examples,
                self.training,
                directory,
                name=f"the model by {module(objective).rpartition('.')[2]}",
                seed=self.seed,
                device=self._training_device,
                log_metrics=log_metrics,
                start=base.directory,
                request=self._wanted,
            )

        code = code_behind(*modules_of(objective, self.training, fit, load_network), map_of(base))
        stage = make("train", code)
        specification = {
            "base": base.identity,
            "data": contents(examples),
            "objective": plain(objective),
            "training": plain(self.training.of_result),
            "seed": self.seed,
            "device": self._training_device,
        }
        directory = stage("training", specification, work, self.training.steps)
        return saved_trajectory(directory, "training", base.directory), f"training/{directory.name}"

    def measured(
        self,
        make: Make,
        base: Base,
        trajectory: Trajectory,
        identity: str,
        examples: Examples,
        of: str = "",
    ) -> Measured:
        """The tables of a trajectory, whose stages `make` makes."""
        stages = partial(make, of=of)
        parts = (self.seed, self.device, self.objective, self.training)
        return Measured(stages, *parts, base, trajectory, identity, examples, self.probes)

    def _stages(self, record: Record, progress: Progress, prefix: str, code: str, of: str = "") -> Stages:
        return Stages(self.outputs, record, prefix, code, self.verify, self.interruption, progress, of)

    def _foreseen(self, examples: Examples) -> tuple[Sequence[Foreseen], Base | None]:
        """The stages, and the base if it needs none; without them where an earlier stage is damaged."""
        try:
            stages, base = foreseen(self, examples)
            past = None if base is None else self.past(base)
            if self.worker is None or base is None or past is None:
                return stages, base
            return foreseen_of(self, base, [(past, base.identity)], examples, self.worker), base
        except (OSError, ValueError, KeyError) as error:  # which the run says or mends
            log.debug("the stages are not foreseen: %s", error)
            return (), None

    def _tell(self, progress: Progress, examples: Examples) -> None:
        """Print the data, the device and the stages, with an estimate of their time."""
        made, unmade = (
            [stage.label for stage in progress.stages if stage.made == state] for state in (True, False)
        )
        say([data_line(examples), f"device: {self.device}"])
        if progress.stages:
            say(foreseen_lines(made, unmade, *seconds_of(self.outputs, progress.stages)))

    @property
    def _modules(self) -> list[str]:
        """The modules of all that it is made of."""
        parts = (self.model, self.data, self.objective, self.training, self.probes, self.interventions)
        return modules_of(*parts, self.claims)

    @property
    def _training_device(self) -> str:
        return self.trained_on or self.device

    @property
    def _wanted(self) -> Request:
        return no_request if self.interruption is None else self.interruption.wanted


def check_parts(
    model: Model,
    objective: Objective | None,
    training: Training,
    probes: Mapping[str, Probe],
    interventions: Mapping[str, Intervention],
    tracking_uri: str,
    name: str,
) -> None:
    """Refuse parts that do not go together, as far as is known without the data."""
    check_experiment(check_tracking_uri(tracking_uri), name)
    modules_of(model, objective, training, probes, interventions)
    measured = {"probe": plain(probes), "intervention": plain(interventions)}
    signature({"objective": plain(objective), "training": plain(training), **measured})
    check_declarations(probes, interventions, objective)
    declarations = {name: probe.declaration for name, probe in probes.items()}
    if isinstance(model, Chain):
        check_chain(model, declarations, [*interventions])
    alone = (isinstance(model, Pretrained) and len(model.locations()) == 1) or (
        isinstance(model, Chain) and model.from_ is not None
    )
    if objective is None and alone:
        check_single(declarations, interventions)
    architecture = model.check(None if objective is None else training.max_length)
    if objective is not None:
        training.lora.check(architecture)
        if training.processes > 1 and isinstance(objective, WithinBatch) and objective.within_batch:
            raise ValueError(
                f"the loss of {module(objective).rpartition('.')[2]} relates the examples of a batch to each"
                f" other, of which {training.processes} processes would each have a part: set"
                " training.processes=1"
            )
    for measurement in (*probes.values(), *interventions.values()):
        measurement.check(architecture)
