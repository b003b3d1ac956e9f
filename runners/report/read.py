"""A study read back from MLflow: `weightgeom report NAME` makes its tables, figures and one page."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportReturnType=false

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from runners.errors import nearest
from runners.tracking.limits import EXPERIMENT_NAME_LENGTH, fitted
from runners.tracking.redaction import one_line, redacted_text
from runners.tracking.stores import check_tracking_uri, open_client
from weightgeom.analysis.chain import STAGES, comparisons
from weightgeom.analysis.declared import EARLIER, declared, plain_name
from weightgeom.analysis.referee import REFEREE
from weightgeom.analysis.settings import ARROW, is_run, settings
from weightgeom.declarations import Declaration
from weightgeom.table import PRETRAINING, joined

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Run


HOURS = "slurm_hours"  # a tag of sweeps
SHARPNESS = ("participation_ratio", "target_energy", "alternatives")  # means over the training


@dataclass(frozen=True)
class Study:
    """The runs and tables of some MLflow experiments.

    `runs` has a row for every finished run, oldest first, with its parts; `rows` every row of
    their tables; `unfinished` name and status of the others; `declarations` those of the tables by name;
    `sweeps` the name and the tags of every sweep that ran under SLURM; `refereed` the verdicts on published
    claims of every run that judged any, with `run_id` and `run_name`.
    """

    names: tuple[str, ...]
    tracking_uri: str  # without secrets
    runs: "pd.DataFrame"
    rows: "pd.DataFrame"
    unfinished: tuple[tuple[str, str], ...]
    declarations: Mapping[str, Declaration] = field(default_factory=dict)
    sweeps: tuple[tuple[str, Mapping[str, str]], ...] = ()
    refereed: "pd.DataFrame | None" = None


def collect(*names: str, tracking_uri: str | None = None) -> "pd.DataFrame":
    """The tables of all finished runs of the experiments as one tidy table.

    Columns: `experiment run_id run_name objective variant seed model model_seed data data_seed preference
    trajectory table`, where `trajectory` is training or pretraining and `table` the probe or intervention,
    then those of every table, `step layer matrix ... stderr n`. Of a chain of stages `objective` is what is
    compared, `sft → dpo`, and each has the rows of step 0. The store is `tracking_uri`, else
    `MLFLOW_TRACKING_URI`, else `outputs/mlflow.db`.

    Raises:
        KeyError: if there is no such experiment.
        ValueError: if none of its runs is finished, or a table is not one of ours.
        FileNotFoundError: if there is no such store, or artifacts are gone.
        ConnectionError: if the store does not answer.
    """
    return read(names, _store(tracking_uri, Path("outputs"))).rows


def read(names: Sequence[str], tracking_uri: str) -> Study:
    """Everything about the experiments; raises as `collect` does."""
    import pandas as pd

    names = list(dict.fromkeys(fitted(name, EXPERIMENT_NAME_LENGTH) for name in names))  # as published
    tracking_uri = check_tracking_uri(tracking_uri)
    shown = redacted_text(tracking_uri)
    database = Path(tracking_uri.removeprefix("sqlite:///"))
    if tracking_uri.startswith("sqlite:") and not database.is_file():
        raise FileNotFoundError(f"no MLflow store at {database}: run something first, or give --tracking-uri")
    try:
        client = open_client(tracking_uri)
        experiments = {
            experiment.name: experiment.experiment_id for experiment in _all(client.search_experiments)
        }
        if unknown := [name for name in names if name not in experiments]:
            raise KeyError(f"no experiment {unknown[0]!r} at {shown}; {nearest(unknown[0], experiments)}")
        both = [run for name in names for run in _all(client.search_runs, [experiments[name]])]
        both.sort(key=lambda run: run.info.start_time)
        every = [run for run in both if is_run(run.data.params)]  # and not the parents of sweeps
        sweeps = [(str(run.info.run_name), run.data.tags) for run in both if HOURS in run.data.tags]
        finished = [run for run in every if run.info.status == "FINISHED"]
        if not finished:
            states = ", ".join(sorted({run.info.status for run in every})) or "none at all"
            raise ValueError(f"no finished run in {', '.join(names)} at {shown} (runs: {states})")
        by_id = {identity: name for name, identity in experiments.items()}
        tables = [_downloaded(client, run) for run in finished]
        refereed = _refereed(finished, tables)
        declarations = _declarations(tables)
        about = [run.data.params for run in finished], [run.data.tags for run in finished]
        runs = pd.DataFrame([_described(run, setting, by_id, client) for run, setting in zip(
            finished, settings(*about, declarations), strict=True
        )])  # fmt: skip
        rows = [
            _rows(run, of_run, declarations) for run, of_run in zip(runs.itertuples(), tables, strict=True)
        ]
    except (KeyError, ValueError, FileNotFoundError):
        raise
    except Exception as error:  # MLflow's, requests' and SQLAlchemy's share no base class
        raise ConnectionError(
            f"no answer from MLflow at {shown}: is the server running, the store whole, and made by this"
            f" version of MLflow? ({one_line(error)[:200]})"
        ) from error
    others = tuple((str(run.info.run_name), run.info.status) for run in every if run not in finished)
    # The rows of a run without tables have no types, and would take those of the others away.
    every_row = pd.concat([part for part in rows if len(part)] or rows, ignore_index=True)
    return Study(tuple(names), shown, runs, every_row, others, declarations, tuple(sweeps), refereed)


def _all(search: Any, *arguments: Any) -> Iterator[Any]:
    """The results of a search, from all of its pages."""
    token = None
    while True:
        page = search(*arguments, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _described(
    run: "Run", setting: dict[str, object], experiments: dict[str, str], client: "MlflowClient"
) -> dict[str, object]:
    import pandas as pd

    params, tags, info = run.data.params, run.data.tags, run.info
    inputs = run.inputs.dataset_inputs if run.inputs else []
    sharpness: dict[str, object] = {}
    for name in SHARPNESS:
        curve = [m.value for m in client.get_metric_history(info.run_id, f"train/{name}")]
        sharpness[name] = sum(curve) / len(curve) if curve else None
    return {
        "experiment": experiments[info.experiment_id],
        "run_id": info.run_id,
        "run_name": info.run_name,
        **setting,
        "probes": _measures(params),
        "steps": params.get("training.steps", "") if setting["objective"] != "none" else "",
        "started": pd.Timestamp(info.start_time, unit="ms", tz="UTC"),
        "minutes": ((info.end_time or info.start_time) - info.start_time) / 60_000,
        "commit": tags.get("git_commit", tags.get("weightgeom_version", "")),
        "uncommitted_changes": tags.get("git_dirty", "") == "true",
        "code": tags.get("code_fingerprint", ""),
        "host": tags.get("host", ""),
        "libraries": ", ".join(
            f"{name} {tags[f'{name}_version']}"
            for name in ("python", "torch", "transformers", "trl")
            if f"{name}_version" in tags
        ),
        "data_set": ", ".join(f"{given.dataset.name} {given.dataset.digest[:12]}" for given in inputs),
        **sharpness,
    }


def _measures(params: Mapping[str, str]) -> bool:
    return any(key.startswith(("probe.", "intervention.")) and key.count(".") > 1 for key in params)


def _downloaded(client: "MlflowClient", run: "Run") -> "dict[str, pd.DataFrame]":
    """The tables of a run by name, but the one that is made of the others."""
    import pandas as pd

    from weightgeom.table import COLUMNS, upgraded

    identity = run.info.run_id
    where = f"the artifacts of run {run.info.run_name!r} ({identity})"
    names = [artifact.path for artifact in client.list_artifacts(identity, "tables")]
    names = [name for name in names if name.endswith(".parquet")]
    if _measures(run.data.params) and not names:
        raise FileNotFoundError(
            f"{where} hold no tables: they were moved or deleted; publish them again with"
            " `weightgeom sync OUTPUTS`, or delete the run in MLflow"
        )
    tables = {}
    with TemporaryDirectory() as directory:
        for name in names:
            try:
                table = upgraded(pd.read_parquet(client.download_artifacts(identity, name, directory)))
            except Exception as error:
                raise FileNotFoundError(
                    f"{where} lack {name}, or it cannot be read ({one_line(error)[:200]})"
                ) from error
            columns = () if Path(name).stem == REFEREE else COLUMNS
            if missing := [column for column in columns if column not in table]:
                raise ValueError(f"{name} in {where} is no table of ours: it has no {', '.join(missing)}")
            if Path(name).stem != STAGES:
                tables[Path(name).stem] = table
    return joined(tables)


def _refereed(runs: "Sequence[Run]", tables: "Sequence[dict[str, pd.DataFrame]]") -> "pd.DataFrame | None":
    """The verdicts of all runs, which are taken out of their tables; None without any."""
    import pandas as pd

    judged = [
        (run, of_run.pop(REFEREE)) for run, of_run in zip(runs, tables, strict=True) if REFEREE in of_run
    ]
    parts = [table.assign(run_id=run.info.run_id, run_name=str(run.info.run_name)) for run, table in judged]
    return pd.concat(parts, ignore_index=True) if parts else None


def _declarations(runs: "Sequence[Mapping[str, pd.DataFrame]]") -> dict[str, Declaration]:
    """The tables' declarations, by the name of their probe or intervention; the newest run's counts.

    In the order of the study's own tables, then by name.
    """
    by_name = {plain_name(name): declared(name, table) for run in runs for name, table in run.items()}
    order = {name: number for number, name in enumerate(EARLIER)}
    names = sorted(by_name, key=lambda name: (order.get(name, len(order)), name))
    return {name: by_name[name] for name in names}


def _rows(
    run: Any, tables: "Mapping[str, pd.DataFrame]", declarations: Mapping[str, Declaration]
) -> "pd.DataFrame":
    """All rows of a run's tables, with the columns that say which run and table they are of."""
    import pandas as pd

    from weightgeom.table import COLUMNS

    keys = ("experiment", "run_id", "run_name", "objective", "variant", "seed", "model", "model_seed")
    place = {key: getattr(run, key) for key in (*keys, "data", "data_seed", "preference")}
    parts = []
    for table, part in tables.items():
        if run.chain:
            stages = _stages(table, part, declarations)
            parts += [rows[list(COLUMNS)].assign(**(place | origin)) for origin, rows in stages]
            continue
        before = table.endswith(PRETRAINING) or (run.objective == "none" and not run.pair)
        origin = {"trajectory": "pretraining" if before else "training"}
        origin["table"] = table.removesuffix(PRETRAINING)
        parts.append(part[list(COLUMNS)].assign(**place, **origin))
    columns = [*place, "trajectory", "table", *COLUMNS]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def _stages(
    name: str, table: "pd.DataFrame", declarations: Mapping[str, Declaration]
) -> "Iterator[tuple[dict[str, str], pd.DataFrame]]":
    """The rows of a chain's table by the stages that they compare, which stand for their objective.

    Both comparisons of a headline become one table; others with the stage before keep the name of theirs.
    """
    plain = plain_name(name)
    place = {"trajectory": "training", "table": plain if declarations[plain].generic else name}
    for before, after, rows in comparisons(name, table, table.attrs[STAGES]):
        yield {**place, "objective": f"{before}{ARROW}{after}"}, rows


def _store(tracking_uri: str | None, outputs: Path) -> str:
    default = f"sqlite:///{(outputs / 'mlflow.db').absolute()}"
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default
