"""Whether MLflow holds what a record does: all of it, line by line, nothing twice and nothing else."""

import json
import math
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from runners.tracking.record import Record

INFINITY = 1.7976931348623157e308  # what MLflow keeps for it
Line = tuple[str, int, int, str]  # key, step, time, value as text: NaN equals NaN


def assert_mirrored(uri: str, *records: Record) -> None:
    """Compare the one MLflow run of each record with what its files say."""
    client = MlflowClient(uri)
    for record in records:
        run = only_run(client, record)
        described, status = record.description(), record.status()
        assert run.info.run_name == described["name"]
        assert (run.info.status, run.info.start_time, run.info.end_time) == (
            status["status"],
            described["start_time"],
            status["end_time"],
        )
        assert run.data.params == described["params"]
        assert described["tags"].items() <= run.data.tags.items()
        assert run.data.tags.get("error") == status["error"]
        assert run.inputs is not None
        read = [
            (dataset_input.dataset.name, dataset_input.dataset.digest)
            for dataset_input in run.inputs.dataset_inputs
        ]
        assert read == [(dataset["name"], dataset["digest"]) for dataset in described["inputs"]]
        published, recorded = lines(client, run), recorded_lines(record)
        assert published == recorded, (recorded - published, published - recorded)
        assert artifacts(client, run) == recorded_artifacts(record)


def only_run(client: MlflowClient, record: Record) -> Run:
    """The run of a record; a second one, unless it was deleted, is an error."""
    described = record.description()
    experiment = client.get_experiment_by_name(described["experiment"])
    assert experiment is not None
    mine = f"tags.record_id = '{described['id']}'"
    (run,) = client.search_runs([experiment.experiment_id], mine, ViewType.ACTIVE_ONLY)
    return run


def lines(client: MlflowClient, run: Run) -> Counter[Line]:
    """Every metric point of a run."""
    histories = (client.get_metric_history(run.info.run_id, key) for key in run.data.metrics)
    return Counter(
        (point.key, point.step, point.timestamp, repr(float(point.value)))
        for history in histories
        for point in history
    )


def recorded_lines(record: Record) -> Counter[Line]:
    """Every whole line of a record's metrics.jsonl, read without its own code."""
    path = record.directory / "metrics.jsonl"
    texts = path.read_text().splitlines(keepends=True) if path.exists() else []
    points: list[dict[str, Any]] = [json.loads(text) for text in texts if text.endswith("\n")]
    return Counter(
        (point["key"], point["step"], point["time"], repr(_kept(point["value"]))) for point in points
    )


def artifacts(client: MlflowClient, run: Run) -> dict[str, bytes]:
    """The bytes of every artifact of a run by its path."""
    with TemporaryDirectory() as place:
        client.download_artifacts(run.info.run_id, "", place)
        return _files(Path(place))


def recorded_artifacts(record: Record) -> dict[str, bytes]:
    return _files(record.directory / "artifacts")


def _files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _kept(value: float) -> float:
    return math.copysign(INFINITY, value) if math.isinf(value) else float(value)
