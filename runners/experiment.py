"""One run: prepare the base, train, probe every checkpoint, draw, and keep a record of it all."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from time import time_ns
from typing import TYPE_CHECKING, Any, TextIO

from runners.comparisons import log_effects
from runners.fingerprint import code_behind, libraries, package
from runners.interruption import Interruption
from runners.processes import terminations_as_exceptions
from runners.provenance import environment, provenance, uncommitted_diff
from runners.record import Record
from runners.redaction import redacted_text
from runners.stages import BETWEEN, COMPARING, STAGES, between, check_chain, side_by_side
from runners.store import full_disk_explained, stage, write_atomically
from runners.summary import draw, log_table, print_summary, progress_bar
from runners.tracking import Publisher, check_tracking_uri
from weightgeom.chain import Chain
from weightgeom.interfaces import (
    Base,
    Data,
    Examples,
    Intervention,
    Log,
    Model,
    NeedsExamples,
    Objective,
    Probe,
    Row,
    Setting,
    Trajectory,
)
from weightgeom.interruption import Wanted, undisturbed
from weightgeom.training import Training

if TYPE_CHECKING:
    import pandas as pd

    from weightgeom.model import LanguageModel

log = logging.getLogger(__name__)
REPOSITORY = Path(__file__).parents[1]
METRICS = "metrics.jsonl"  # of a stage: what was logged while it was made
RESUMABLE = "checkpoint-*"  # what the work of a stage goes on from: the states of transformers' trainers


@dataclass(frozen=True)
class Experiment:
    """Everything that one run is made of; `directory` gets its record, `outputs` what others reuse."""

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

    def run(self) -> "dict[str, pd.DataFrame]":
        """Check all of it, do what was not done before, and return the tables by name."""
        examples = self.check()
        uri = check_tracking_uri(self.tracking_uri)
        with full_disk_explained(self.directory):
            record = self._record(uri, examples)
        with self._terminations(), Publisher(record.directory, uri), record:
            tables = self._tables(record, examples)
            with full_disk_explained(record.directory):
                for name, table in tables.items():
                    table.to_parquet(record.artifact(f"tables/{name}.parquet"))
                    table.to_csv(record.artifact(f"tables/{name}.csv"), index=False)
                draw(tables, record)
        effects = {name: intervention.headline for name, intervention in self.interventions.items()}
        print_summary(tables, effects, record.directory, uri)
        return tables

    def check(self) -> Examples:
        """Refuse everything that cannot work before anything expensive starts; read the data."""
        check_parts(
            self.model, self.objective, self.training, self.probes, self.interventions, self.tracking_uri
        )
        examples = self.data.examples()
        if self.objective is not None:
            self.objective.check(examples)
            self.training.check(examples)
        if (self.probes or self.interventions) and not examples.heldout:
            raise ValueError(f"{examples.name} has no held-out text to probe on: give some with data.heldout")
        for measurement in (*self.probes.values(), *self.interventions.values()):
            if isinstance(measurement, NeedsExamples):
                measurement.check_examples(examples)
        return examples

    def _terminations(self) -> AbstractContextManager[None]:
        survives = self.interruption is not None and self.interruption.survive
        return nullcontext() if survives else terminations_as_exceptions()

    def _record(self, uri: str, examples: Examples) -> Record:
        data = {
            "name": examples.name,
            "digest": examples.digest[:32],
            "source": str(self.params["data"]),
            "context": "all",
        }
        record = Record.create(
            self.directory / "record",
            experiment=self.name,
            name=self.run_name,
            params=self.params,
            tags={**provenance(REPOSITORY), "code_fingerprint": package(), **self.tags},
            inputs=[data],  # pyright: ignore[reportArgumentType]
            tracking_uri=uri,
            parent=self.parent,
        )
        record.artifact("config.yaml").write_text(redacted_text(self.config))
        record.artifact("environment.txt").write_text(environment())
        if diff := uncommitted_diff(REPOSITORY):
            record.artifact("code/uncommitted.diff").write_text(diff)
        return record

    def _tables(self, record: Record, examples: Examples) -> "dict[str, pd.DataFrame]":
        make = self.stages(record, "pretraining", code_behind(_module(self.model)))
        base = self.model.prepare(make, examples, self.data, self.device, self._wanted)
        tables, measured = {}, None
        for trajectory, identity in self._trajectories(record, base, examples):
            measured = Measured(self, record, base, trajectory, identity, examples)
            suffix = "_pretraining" if self.objective is not None and trajectory is base.trajectory else ""
            for name, probe in self.probes.items():
                tables[name + suffix] = self._about(name, trajectory, measured.table(name, probe))
                log_table(record, name, suffix, tables[name + suffix], probe.headline)
        if base.trajectory is not None and base.pairs:
            names = enumerate(base.trajectory.stages)  # for who sees a curve by step
            record.tag(STAGES, ", ".join(f"{step} {stage}" for step, stage in names))
            for name, table in self._between_stages(record, base, examples):
                tables[name + BETWEEN] = self._about(name, base.trajectory, table)
                log_table(record, name, BETWEEN, table, self.probes[name].headline)
            if "rsf" in tables:
                tables[STAGES] = side_by_side(tables)
        for name, intervention in self.interventions.items():
            assert measured is not None  # some trajectory there is: a model without one is refused
            tables[name] = measured.effects(name, intervention)  # of the last one
            log_effects(record, name, tables[name], intervention.headline)
        return tables

    def _about(self, name: str, trajectory: Trajectory, table: "pd.DataFrame") -> "pd.DataFrame":
        """The table, told what the figures say of it: whose subspaces it is in, and what its steps are."""
        at = str(self.params.get(f"probe.{name}.at"))
        automatic = "step" if trajectory.from_random else "start"
        table.attrs["at"] = automatic if at == "auto" else at
        table.attrs["trained"] = trajectory.name in ("training", "pair", "chain")  # from a base, its step 0
        if trajectory.stages:
            table.attrs[STAGES] = list(trajectory.stages)
        return table

    def _between_stages(
        self, record: Record, base: Base, examples: Examples
    ) -> "Iterator[tuple[str, pd.DataFrame]]":
        """Of every probe that compares, what `model=pair` gives of each stage and the one before it."""
        names = [name for name in self.probes if name in COMPARING]
        found: dict[str, list[pd.DataFrame]] = {name: [] for name in names}
        assert base.trajectory is not None
        for pair, (before, after) in zip(base.pairs, pairwise(base.trajectory.stages), strict=True):
            assert pair.trajectory is not None
            log.info("stage %s against %s, the one before it", after, before)
            measured = Measured(self, record, pair, pair.trajectory, pair.identity, examples)
            for name in names:
                found[name].append(measured.table(name, self.probes[name]))
        yield from ((name, between(pairs)) for name, pairs in found.items())

    def _trajectories(
        self, record: Record, base: Base, examples: Examples
    ) -> Iterator[tuple[Trajectory, str]]:
        if base.trajectory is not None:
            yield base.trajectory, base.identity
        if self.objective is not None:
            yield self._trained(record, base, self.objective, examples)

    def _trained(
        self, record: Record, base: Base, objective: Objective, examples: Examples
    ) -> tuple[Trajectory, str]:
        def work(directory: Path, log_metrics: Log) -> None:
            from weightgeom.model import load_network, load_tokenizer  # noqa: PLC0415 (heavy)
            from weightgeom.training import fit  # noqa: PLC0415

            fit(
                objective,
                load_network(base.directory).to(self.device),  # pyright: ignore[reportArgumentType]
                load_tokenizer(base.directory),
                examples,
                self.training,
                directory,
                name=f"the model by {_module(objective).rpartition('.')[2]}",
                seed=self.seed,
                device=self.device,
                log_metrics=log_metrics,
                start=base.directory,
                wanted=self._wanted,
            )

        code = code_behind(_module(objective), "weightgeom.training")
        make = self.stages(record, "train", code)
        specification = {
            "base": base.identity,
            "data": examples.digest,
            "objective": _plain(objective),
            "training": _plain(self.training),
            "seed": self.seed,
            "device": self.device,
        }
        directory = make("training", specification, work, self.training.steps)
        from weightgeom.training import trajectory  # noqa: PLC0415 (heavy)

        return trajectory(directory, "training", base.directory), f"training/{directory.name}"

    def stages(self, record: Record, prefix: str, code: str) -> "Stages":
        """Makes stages whose metrics go into `record` under `prefix`."""
        return Stages(self.outputs, record, prefix, code, self.interruption)

    @property
    def _wanted(self) -> Wanted:
        return undisturbed if self.interruption is None else self.interruption.wanted


def check_parts(
    model: Model,
    objective: Objective | None,
    training: Training,
    probes: Mapping[str, Probe],
    interventions: Mapping[str, Intervention],
    tracking_uri: str,
) -> None:
    """Refuse what does not go together, as far as can be told without the data."""
    check_tracking_uri(tracking_uri)
    if isinstance(model, Chain):
        check_chain([*probes], [*interventions])
    architecture = model.check(None if objective is None else training.max_length)
    if objective is not None:
        training.lora.check(architecture)
    for measurement in (*probes.values(), *interventions.values()):
        measurement.check(architecture)


@dataclass(frozen=True)
class Stages:
    """Makes stages whose metrics go into the record, live or, for a stage made before, from its log."""

    outputs: Path
    record: Record
    prefix: str  # of the metrics' names
    code: str  # fingerprint of what the result depends on
    interruption: Interruption | None = None

    def __call__(
        self, name: str, specification: Mapping[str, object], work: Callable[[Path, Log], None], steps: int
    ) -> Path:
        """The finished directory of a stage of `steps` steps; work that was cut goes on if it can."""
        fresh = False

        def logged(directory: Path) -> None:
            nonlocal fresh
            fresh = True
            file: TextIO | None = None
            with ExitStack() as stack:
                advance = stack.enter_context(progress_bar(name, steps))

                def log_metrics(metrics: Mapping[str, float], step: int) -> None:
                    nonlocal file
                    if file is None:
                        file = stack.enter_context(self._resumed(directory, step))
                    advance(step, metrics)
                    if metrics:
                        row = {"metrics": dict(metrics), "step": step, "time": time_ns() // 1_000_000}
                        file.write(json.dumps(row) + "\n")
                        file.flush()
                        self._log(row)

                work(directory, log_metrics)

        code = {"code": self.code, "libraries": libraries()}
        with nullcontext() if self.interruption is None else self.interruption.stage():
            directory = stage(self.outputs, name, {**specification, **code}, logged, RESUMABLE)
        if not fresh:
            for row in _metrics(directory):
                self._log(row)
        return directory

    def _resumed(self, directory: Path, step: int) -> TextIO:
        """The log of a stage's metrics from `step` on, open behind the rows that were before it.

        These go into the record, too; rows of steps that are now done again are dropped.
        """
        rows = [row for row in _metrics(directory) if row["step"] < step]
        path = directory / METRICS
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            self._log(row)
        return path.open("a")

    def _log(self, row: dict[str, Any]) -> None:
        metrics = {f"{self.prefix}/{name}": value for name, value in row["metrics"].items()}
        self.record.log(metrics, row["step"], row["time"])


def _metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of a stage's metrics; a last one that a kill has cut is left out."""
    path = directory / METRICS
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@dataclass(frozen=True)
class Measured:
    """The tables of one trajectory; a model is loaded only if one of them is not there yet."""

    experiment: Experiment
    record: Record
    base: Base
    trajectory: Trajectory
    identity: str
    examples: Examples

    def table(self, name: str, probe: Probe) -> "pd.DataFrame":
        """The table of one probe over all checkpoints."""

        def rows(log_metrics: Log) -> list[Row]:
            measure = probe.measurement(self.setting)
            found: list[Row] = []
            for index, (step, checkpoint) in enumerate(self.trajectory.steps.items()):
                params = self._model.params(checkpoint, self.setting.start)
                found += [{"step": step, **row} for row in measure(params)]
                log_metrics({}, index + 1)
            return found

        return self._made(name, {"probe": _plain(probe)}, rows, len(self.trajectory.steps))

    def effects(self, name: str, intervention: Intervention) -> "pd.DataFrame":
        """The table of one intervention."""

        def rows(log_metrics: Log) -> list[Row]:
            return intervention.rows(self.setting, log_metrics)

        from weightgeom.model import load_architecture  # noqa: PLC0415 (heavy)

        arms = intervention.arms(load_architecture(self.base.directory))
        return self._made(name, {"intervention": _plain(intervention)}, rows, arms)

    def _made(
        self, name: str, what: Mapping[str, object], rows: Callable[[Log], list[Row]], steps: int
    ) -> "pd.DataFrame":
        import pandas as pd  # noqa: PLC0415 (heavy)

        def work(directory: Path, log_metrics: Log) -> None:
            from weightgeom.table import tabulate  # noqa: PLC0415 (heavy)

            tabulate(rows(log_metrics)).to_parquet(directory / f"{name}.parquet")

        specification = {
            "trajectory": self.identity,
            "base": self.base.identity,
            **what,
            "data": self.examples.digest,
            "seed": self.experiment.seed,
            "device": self.experiment.device,
        }
        make = self.experiment.stages(self.record, name, package())
        directory = make(name, specification, work, steps)
        return pd.read_parquet(directory / f"{name}.parquet")

    @cached_property
    def setting(self) -> Setting:
        """What every probe of this trajectory is given."""
        steps = self.trajectory.steps
        start = self._model.params(steps[0])
        end = self._model.params(steps[self.trajectory.last], start)
        trained = self.trajectory is not self.base.trajectory
        return Setting(
            self._model,
            start,
            end,
            self.trajectory.from_random,
            self.examples,
            self.experiment.seed,
            self.experiment.objective if trained else None,
            self.experiment.training,
            self.trajectory.last,
        )

    @cached_property
    def _model(self) -> "LanguageModel":
        from weightgeom.model import load  # noqa: PLC0415 (heavy)

        return load(self.base.directory, self.experiment.device)


def _plain(thing: object) -> dict[str, Any]:
    """A configured object as plain data: its class and fields."""
    return {"class": f"{_module(thing)}.{type(thing).__name__}", **asdict(thing)}  # pyright: ignore[reportArgumentType]


def _module(thing: object) -> str:
    return type(thing).__module__
