"""The end of a sweep: its summary, its report, and the records of runs that died before ending theirs."""

import logging
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runners.errors import explanation
from runners.launcher.manifest import Sweep
from runners.launcher.status import JobStatus
from runners.launcher.usage import usage
from runners.summary.sweep import summarise
from runners.tracking.record import Record
from runners.tracking.redaction import redacted_text
from runners.tracking.sync import publish

log = logging.getLogger(__name__)
REPORT = "report.html"  # the name of the report among the artifacts of a sweep's record


def end_sweep(sweep: Sweep, statuses: Sequence[JobStatus]) -> None:
    """Once all jobs have ended, end the sweep's record and those of runs that died; repeating it is safe.

    Needs the sweep's lock.
    """
    if any(job.active for job in statuses):
        return
    record = Record(sweep.directory / "record")
    if not record.described():  # the launcher was killed before it submitted anything
        return
    if record.status()["status"] != "RUNNING":
        return
    descriptions = {job.number: sweep.job(job.number) for job in statuses}
    first = next(iter(descriptions.values()))
    run_records = [_ended_record(job, descriptions[job.number]) for job in statuses]
    summarise(record, [run_record.directory for run_record in run_records])
    if sweep.manifest()["launcher"] == "slurm" and (used := usage(sweep)):
        record.update(tags=used.tags())  # not metrics: a sweep that is resubmitted ends again
        log.info(
            "used %.2f hours of SLURM jobs, of which at most %.2f were lost, and at most %.2f GiB in one",
            *(used.hours, used.lost_hours, used.peak_memory_gib),
        )
    publish([record, *run_records], first["tracking_uri"])
    if any(description["config"].get("report") for description in descriptions.values()):
        _make_report(record, first)
    failed = [job for job in statuses if job.failed]
    cancelled = all(job.cancelled for job in failed)
    error = f"{len(failed)} of {len(statuses)} jobs did not complete" if failed else None
    record.end("FINISHED" if not failed else "KILLED" if cancelled else "FAILED", error)
    publish([record], first["tracking_uri"])


def _make_report(record: Record, job: Mapping[str, Any]) -> None:
    """Make the experiment's report and copy its page to the sweep's record; an error becomes a warning."""
    from runners.report.make import make

    record.artifact(REPORT).unlink(missing_ok=True)
    try:
        page = make([job["config"]["name"]], job["tracking_uri"], Path(job["outputs"]))
        shutil.copyfile(page, record.artifact(REPORT))
    except Exception as error:  # the runs themselves are complete
        log.warning("no report was made: %s", explanation(error))


def sweep_report(sweep: Sweep) -> tuple[Path | None, str] | None:
    """The page of an ended sweep's report, None if it was not made, and the command that makes it.

    None for a sweep without report=true.
    """
    from runners.report.make import directory_of

    job = sweep.job(next(iter(sweep.jobs())))
    if not job["config"].get("report"):
        return None
    name, outputs, store = job["config"]["name"], job["outputs"], redacted_text(job["tracking_uri"])
    command = ["weightgeom", "report", name, "--outputs", outputs, "--tracking-uri", store]
    made = (sweep.directory / "record/artifacts" / REPORT).exists()
    return directory_of(Path(outputs), [name]) / "index.html" if made else None, shlex.join(command)


def _ended_record(job: JobStatus, description: Mapping[str, Any]) -> Record:
    """The record of a run, ended here if the run died before it could end the record itself."""
    record = Record(Path(description["directory"]) / "record")
    if not record.described():
        Record.create(
            record.directory,
            experiment=description["config"]["name"],
            name=description["run_name"],
            params=description["params"],
            tags=description["config"]["tags"],
            inputs=[],
            tracking_uri=description["tracking_uri"],
            parent=Path(description["parent"]),
        )
    if job.failed and record.status()["status"] in ("SCHEDULED", "RUNNING"):
        status = "KILLED" if job.state in ("CANCELLED", "KILLED") else "FAILED"
        record.end(status, job.error or job.state.lower(), record.last_sign_of_life())
    return record
