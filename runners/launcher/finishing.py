"""End of a sweep: its summary, its report and the records of runs that could not end theirs."""

import logging
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runners.errors import complaint
from runners.launcher.manifest import Sweep
from runners.launcher.status import Row
from runners.summary.sweep import summarise
from runners.tracking.record import Record
from runners.tracking.redaction import redacted_text
from runners.tracking.sync import publish

log = logging.getLogger(__name__)


REPORT = "report.html"  # of a sweep: the artifact


def finish(sweep: Sweep, rows: Sequence[Row]) -> None:
    """End the sweep's record, and those of runs that could not do it, if all jobs have ended; only once."""
    if any(row.active for row in rows):
        return
    with sweep.lock():
        record = Record(sweep.directory / "record")
        if record.status()["status"] != "RUNNING":
            return
        jobs = {row.number: sweep.job(row.number) for row in rows}
        ended = [_ended(row, jobs[row.number]) for row in rows]
        uri = next(iter(jobs.values()))["tracking_uri"]
        summarise(record, [one.directory for one in ended])
        publish([record, *ended], uri)
        if any(job["config"].get("report") for job in jobs.values()):
            _report(record, next(iter(jobs.values())))
        failed = [row for row in rows if row.failed]
        cancelled = all(row.state == "CANCELLED" for row in failed)
        error = f"{len(failed)} of {len(rows)} jobs did not complete" if failed else None
        record.end("FINISHED" if not failed else "KILLED" if cancelled else "FAILED", error)
        publish([record], uri)


def _report(record: Record, job: Mapping[str, Any]) -> None:
    """Make the report on the experiment, of which the sweep's record gets the page; trouble is a warning."""
    from runners.report.make import make

    record.artifact(REPORT).unlink(missing_ok=True)
    try:
        page = make([job["config"]["name"]], job["tracking_uri"], Path(job["outputs"]))
        shutil.copyfile(page, record.artifact(REPORT))
    except Exception as error:  # whatever it is, the runs are done
        log.warning("no report was made: %s", complaint(error))


def report_of(sweep: Sweep) -> tuple[Path | None, str] | None:
    """The page on a sweep that has ended, if it was made, and what makes it; None if none was asked for."""
    from runners.report.make import directory_of

    job = sweep.job(next(iter(sweep.jobs())))
    if not job["config"].get("report"):
        return None
    name, outputs, store = job["config"]["name"], job["outputs"], redacted_text(job["tracking_uri"])
    command = ["python", "-m", "runners.report", name, "--outputs", outputs, "--tracking-uri", store]
    made = (sweep.directory / "record/artifacts" / REPORT).exists()
    return directory_of(Path(outputs), [name]) / "index.html" if made else None, shlex.join(command)


def _ended(row: Row, job: Mapping[str, Any]) -> Record:
    """The record of a run, which now says how it ended, where the run could not do it."""
    record = Record(Path(job["directory"]) / "record")
    if not (record.directory / "run.json").exists():
        Record.create(
            record.directory,
            experiment=job["config"]["name"],
            name=job["run_name"],
            params=job["params"],
            tags=job["config"]["tags"],
            inputs=[],
            tracking_uri=job["tracking_uri"],
            parent=Path(job["parent"]),
        )
    if row.failed and record.status()["status"] in ("SCHEDULED", "RUNNING"):
        status = "KILLED" if row.state in ("CANCELLED", "KILLED") else "FAILED"
        record.end(status, row.error or row.state.lower(), record.last_sign_of_life())
    return record
