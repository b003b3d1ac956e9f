"""The tables of one trajectory: each made once, by a probe of every checkpoint or by an intervention."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runners.pipeline.fingerprint import package
from runners.tracking.record import Record
from weightgeom.interfaces import Intervention, Log, Probe, Setting
from weightgeom.table import Row
from weightgeom.text.examples import Examples
from weightgeom.trajectory import Base, Trajectory

if TYPE_CHECKING:
    import pandas as pd

    from runners.pipeline.experiment import Experiment
    from weightgeom.models.language_model import LanguageModel


@dataclass(frozen=True)
class Measured:
    """The tables of one trajectory; a model is loaded only if one of them is not there yet."""

    experiment: "Experiment"
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

        return self._made(name, {"probe": plain(probe)}, rows, len(self.trajectory.steps))

    def effects(self, name: str, intervention: Intervention) -> "pd.DataFrame":
        """The table of one intervention."""

        def rows(log_metrics: Log) -> list[Row]:
            return intervention.rows(self.setting, log_metrics)

        from weightgeom.models.loading import load_architecture

        arms = intervention.arms(load_architecture(self.base.directory))
        return self._made(name, {"intervention": plain(intervention)}, rows, arms)

    def _made(
        self, name: str, what: Mapping[str, object], rows: Callable[[Log], list[Row]], steps: int
    ) -> "pd.DataFrame":
        import pandas as pd

        from weightgeom.table import tabulate, upgraded

        def work(directory: Path, log_metrics: Log) -> None:
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
        return upgraded(pd.read_parquet(directory / f"{name}.parquet"))

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
        from weightgeom.models.loading import load

        return load(self.base.directory, self.experiment.device)


def plain(thing: object) -> dict[str, Any]:
    """A configured object as plain data: its class and fields."""
    return {"class": f"{module(thing)}.{type(thing).__name__}", **asdict(thing)}  # pyright: ignore[reportArgumentType]


def module(thing: object) -> str:
    """The name of the module that its class is in."""
    return type(thing).__module__
