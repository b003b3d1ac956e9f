"""The tables of one trajectory: each made once, by a probe of every checkpoint or by an intervention."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

from runners.disk import write_atomically
from runners.modules import fields_of, modules_of, required
from runners.pipeline.fingerprint import code_behind, contents
from runners.pipeline.logged_stages import Foresight, Stages
from weightgeom.estimators.pairs import OfPairs, together
from weightgeom.estimators.per_matrix import PerMatrix
from weightgeom.interfaces import Intervention, Log, Objective, Probe, Setting, Stage
from weightgeom.models.weights import check_finite
from weightgeom.params import Params
from weightgeom.table import Row
from weightgeom.text.examples import Examples
from weightgeom.trajectory import Base, Trajectory

if TYPE_CHECKING:
    import pandas as pd

    from weightgeom.models.language_model import LanguageModel
    from weightgeom.training.config import Training

log = logging.getLogger(__name__)
PUBLISHED = ("chain", "revisions")  # trajectories of checkpoints that nobody has looked at before
PIECES, SHARED = "pieces", "shared"  # stages: checkpoints of a table, and all that its pieces need


def kept_rows(directory: Path, most: int) -> list[list[Row]]:
    """The rows of the first checkpoints or trials, as an interrupted stage kept them, up to one without any.

    Rows that are not those that were kept are named in a warning, and are measured again.
    """
    kept: list[list[Row]] = []
    for index in range(most):
        path = _kept(directory, index)
        if not path.is_file():
            break
        digest, _, content = path.read_bytes().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != digest:
            log.warning("%s is not the file that was written: measuring its part again", path)
            break
        kept.append(json.loads(content))
    return kept


def keep_rows(directory: Path, index: int, rows: list[Row]) -> None:
    """Write the rows of a checkpoint or a trial behind their SHA-256."""
    content = json.dumps(rows, default=lambda value: value.item()).encode()
    digest = hashlib.sha256(content).hexdigest().encode()
    write_atomically(_kept(directory, index), digest + b"\n" + content)


def _kept(directory: Path, index: int | str) -> Path:
    return directory / f"checkpoint-{index}.rows"  # matches RESUMABLE


@dataclass(frozen=True, eq=False)
class Opened(Mapping[int, Params]):
    """The weights of checkpoints by step, opened at every access, so that none stays open."""

    model: "LanguageModel"
    steps: Mapping[int, Path]
    start: Params

    def __getitem__(self, step: int) -> Params:
        return self.model.params(self.steps[step], self.start)

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Measured:
    """The tables of one trajectory; a model is loaded only if one of them is not there yet."""

    stages: Callable[[str, str], Stage]  # for a prefix of the metrics and a fingerprint of the code
    seed: int
    device: str
    objective: Objective | None
    training: "Training"
    base: Base
    trajectory: Trajectory
    identity: str
    examples: Examples
    probes: Mapping[str, Probe] = field(default_factory=dict)  # that will be asked for, in this order

    def table(self, name: str, probe: Probe, pieces: Sequence[Sequence[int]] = ()) -> "pd.DataFrame":
        """The table of one probe over all checkpoints, whose rows are in these `pieces` of steps, if any.

        The rows of each checkpoint are kept at once, so that an interrupted stage goes on behind the last
        one. Probes of pairs of matrices that are asked for later are measured in the same walk.
        """
        steps = list(self.trajectory.steps)

        def rows(directory: Path, log_metrics: Log) -> list[Row]:
            if pieces:
                found = (
                    kept_rows(self.piece(name, probe, piece, aside=True), len(piece)) for piece in pieces
                )
                measured = [row for piece in found for of_step in piece for row in of_step]
            else:
                measured = self._rows(
                    name, probe, self.setting, steps, directory, log_metrics, self._behind(name)
                )
            self._check_headline(name, probe, measured)
            return measured

        return self._made(name, "probe", probe, rows, len(steps))

    def piece(self, name: str, probe: Probe, steps: Sequence[int], aside: bool = False) -> Path:
        """The stage with the rows of some checkpoints, in order and one after the other in the trajectory.

        All that every piece needs, such as reference subspaces, is made once, in a stage `shared`. With
        `aside` another stage needs it.
        """
        specification, stages = self._specification("probe", probe, steps), self._stages_of(name, probe)
        assert isinstance(stages, Stages | Foresight)

        def work(directory: Path, log_metrics: Log) -> None:
            about = {key: value for key, value in specification.items() if key != "steps"}
            setting = replace(self.setting, shared=partial(stages.aside, SHARED, about))
            self._rows(name, probe, setting, steps, directory, log_metrics, {})

        if aside:
            return stages.aside(PIECES, specification, lambda directory: work(directory, lambda *_: None))
        return stages(PIECES, specification, work, len(steps))

    def unmade(self, name: str, probe: Probe) -> bool:
        """Whether the table of a probe is still to be made."""
        stages = self._stages_of(name, probe)
        assert isinstance(stages, Stages | Foresight)
        return not stages.made(name, self._specification("probe", probe, list(self.trajectory.steps)))

    def _rows(
        self,
        name: str,
        probe: Probe,
        setting: Setting,
        steps: Sequence[int],
        directory: Path,
        log_metrics: Log,
        behind: Mapping[str, Probe],
    ) -> list[Row]:
        """The rows of some checkpoints, each kept at once; those that are kept already are not made again.

        Unless the probe is divisible, the checkpoint before the first one to be measured is measured with it.
        Probes `behind` it are measured in the same walk.
        """
        kept = kept_rows(directory, len(steps))
        measured = [row for part in kept for row in part]
        left, order = steps[len(kept) :], list(self.trajectory.steps)
        if not left:
            return measured
        before = order[: order.index(left[0])][-1:]
        if before and probe.declaration.divisible:
            setting = replace(setting, before=setting.checkpoints[before[0]])
        measure = self._measurement(name, probe, setting, behind)
        for step in before if not probe.declaration.divisible else ():
            measure(step, setting.checkpoints[step])
            log_metrics({}, len(kept))
        for index, step in enumerate(left, len(kept)):
            params = setting.end if step == self.trajectory.last else setting.checkpoints[step]
            if self.trajectory.name in PUBLISHED:
                check_finite(params, self._model.architecture, str(self.trajectory.steps[step]))
            rows = [{"step": step, **row} for row in measure(step, params)]
            keep_rows(directory, index, rows)
            measured += rows
            log_metrics({}, index + 1)
        return measured

    def _measurement(
        self, name: str, probe: Probe, setting: Setting, behind: Mapping[str, Probe]
    ) -> Callable[[int, Params], list[Row]]:
        """The measurement of a checkpoint, from a walk made for an earlier probe where there was one."""
        if not isinstance(probe, OfPairs):
            alone = probe.measurement(setting)
            return lambda step, params: alone(params)
        walk = together({name: probe, **behind}, setting)

        def measure(step: int, params: Params) -> list[Row]:
            if (name, step) not in self._walked:
                self._walked.update({(other, step): rows for other, rows in walk(params).items()})
            return self._walked.pop((name, step))

        return measure

    def _behind(self, name: str) -> dict[str, Probe]:
        """The probes of pairs of matrices whose tables are still to be made after this one's."""
        names = list(self.probes)
        later = names[names.index(name) + 1 :] if name in names else []
        return {
            other: self.probes[other]
            for other in later
            if isinstance(self.probes[other], OfPairs) and self.unmade(other, self.probes[other])
        }

    @cached_property
    def _walked(self) -> dict[tuple[str, int], list[Row]]:
        """Rows of probes, by name and step, whose turn is still to come."""
        return {}

    def effects(self, name: str, intervention: Intervention) -> "pd.DataFrame":
        """The table of one intervention.

        The rows of each trial are kept at once, so that an interrupted stage goes on behind the last one.
        """
        from weightgeom.models.loading import load_architecture

        arms = intervention.arms(load_architecture(self.base.directory))

        def rows(directory: Path, log_metrics: Log) -> list[Row]:
            trials, kept = count(), kept_rows(directory, arms)  # no more trials than arms

            def keep(of_trial: Callable[[], list[Row]]) -> list[Row]:
                index = next(trials)
                if index < len(kept):
                    return kept[index]
                measured = of_trial()
                keep_rows(directory, index, measured)
                return measured

            return intervention.rows(replace(self.setting, keep=keep), log_metrics)

        return self._made(name, "intervention", intervention, rows, arms)

    def _check_headline(self, name: str, probe: Probe, rows: list[Row]) -> None:
        """Refuse a headline that selects no row, but where nothing moved.

        Raises:
            ValueError: with the quantities that there are.
        """
        from weightgeom.table import of_matrices, tabulate

        headline = probe.declaration.headline
        if not rows or not headline or len(of_matrices(tabulate(rows), headline)) or not self._moved:
            return
        of_matrix = dict.fromkeys(row["quantity"] for row in rows if row.get("matrix"))
        raise ValueError(
            f"probe.{name} declares the headline {headline!r}, but no matrix has such a row: declare one of"
            f" {', '.join(of_matrix) or 'none, by an empty headline'}"
        )

    @property
    def _moved(self) -> bool:
        """Whether any matrix is another at the end of the trajectory."""
        start, end = self.setting.start, self.setting.end
        names = {matrix.parameter for matrix in self._model.architecture.matrices}
        return any(not torch.equal(start[name], end[name]) for name in names)

    def _made(
        self, name: str, kind: str, thing: object, rows: Callable[[Path, Log], list[Row]], steps: int
    ) -> "pd.DataFrame":
        import pandas as pd

        from weightgeom.table import tabulate, upgraded

        def work(directory: Path, log_metrics: Log) -> None:
            tabulate(rows(directory, log_metrics)).to_parquet(directory / f"{name}.parquet")
            for path in directory.glob(_kept(directory, "*").name):
                path.unlink()

        specification = self._specification(kind, thing, list(self.trajectory.steps))
        directory = self._stages_of(name, thing)(name, specification, work, steps)
        return upgraded(pd.read_parquet(directory / f"{name}.parquet"))

    def _specification(self, kind: str, thing: object, steps: Sequence[int]) -> dict[str, object]:
        return {
            "trajectory": self.identity,
            "steps": list(steps),
            "from_random": self.trajectory.from_random,
            "base": self.base.identity,
            kind: plain(thing),
            "data": self._data,
            "seed": self.seed,
            "device": self.device,
        }

    def _stages_of(self, name: str, thing: object) -> Stage:
        from weightgeom.models.loading import load
        from weightgeom.table import tabulate

        return self.stages(name, code_behind(*modules_of(thing, load, tabulate), map_of(self.base)))

    @cached_property
    def setting(self) -> Setting:
        """The input of every probe of this trajectory."""
        steps = self.trajectory.steps
        start = self._model.params(steps[self.trajectory.first])
        end = self._model.params(steps[self.trajectory.last], start)
        trained = self.trajectory is not self.base.trajectory
        return Setting(
            self._model,
            start,
            end,
            self.trajectory.from_random,
            self.examples,
            self.seed,
            self.objective if trained else None,
            self.training,
            self.trajectory.last,
            Opened(self._model, steps, start),
        )

    @cached_property
    def _data(self) -> str:
        return contents(self.examples)

    @cached_property
    def _model(self) -> "LanguageModel":
        from weightgeom.models.loading import load

        return load(self.base.directory, self.device)


def plain(thing: object) -> Any:
    """A configured object as plain data: its class and its fields, objects in them in the same way."""
    thing = configured(thing)
    if isinstance(thing, str | int | float | None):
        return thing
    if isinstance(thing, Mapping):
        return {key: plain(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [plain(value) for value in thing]
    if isinstance(thing, partial):
        return {"function": plain(thing.func), "arguments": plain(thing.args), **plain(thing.keywords)}
    if isinstance(thing, type | FunctionType):
        return f"{thing.__module__}.{thing.__qualname__}"
    given = fields_of(thing)
    known = given or is_dataclass(thing) or required(type(thing).__module__) is not None
    return {"class": plain(type(thing)), **plain(given)} if known else thing


def map_of(base: Base) -> str:
    """The module with the residual-stream map of a base, which is imported by the name of its type."""
    from weightgeom.models.loading import load_config
    from weightgeom.models.residual import map_module

    return map_module(load_config(base.directory))


def module(thing: object) -> str:
    """The name of the module that its class is in."""
    return type(configured(thing)).__module__


def configured(thing: object) -> object:
    """The object that the configuration names, unwrapped from the probe that the runner made."""
    return thing.function if isinstance(thing, PerMatrix) else thing
