"""Commands on sweeps: launch, status, wait, cancel and resubmit."""

import logging
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from runners.errors import explanation
from runners.launcher import local, slurm
from runners.launcher.finishing import end_sweep, sweep_report
from runners.launcher.jobs import Job
from runners.launcher.live_table import LiveTable
from runners.launcher.manifest import Sweep
from runners.launcher.snapshot import changed_since, take_snapshot
from runners.launcher.status import JobStatus, StatusPoller, job_names, settled_statuses
from runners.tracking.provenance import provenance
from runners.tracking.record import Record
from runners.tracking.stores import check_tracking_uri

log = logging.getLogger(__name__)
REPOSITORY = Path(__file__).parents[2]


def _command(name: str, sweep: Sweep) -> str:
    return shlex.join(["weightgeom", "sweep", name, str(sweep.directory)])


def launch(
    directory: Path,
    launcher: str,
    options: Mapping[str, Any],
    jobs: Mapping[int, dict[str, Any]],
    overrides: Sequence[str],
) -> Sweep:
    """Start the jobs, described as JSON, and return the sweep.

    Raises:
        ValueError: if an option is wrong, `directory` holds another sweep, or SLURM refuses the jobs.
        ConnectionError: if SLURM does not answer.
    """
    sweep = Sweep(directory)
    if any((Path(job["directory"]) / "job.json").exists() for job in jobs.values()):
        raise ValueError(
            f"{directory} holds a sweep already: set hydra.sweep.dir= to another directory, or restart that"
            f" sweep's failed jobs with {_command('resubmit', sweep)}"
        )
    limits = _options(launcher, options).limits()
    sweep.create(launcher, options, overrides)
    for number, job in jobs.items():
        uri = check_tracking_uri(job["config"]["tracking_uri"])  # absolute, for commands in other directories
        sweep.add_job(number, {**job, "limits": limits, "tracking_uri": uri})
    sweep.list_jobs({number: job["directory"] for number, job in jobs.items()})
    _open_record(sweep, overrides)
    submit(sweep, list(jobs), _snapshot(sweep))
    return sweep


def remove_unlaunched(directory: Path) -> None:
    """Remove a sweep that failed to launch, and the directories that are empty without it."""
    for job_directory in (path.parent for path in directory.glob("*/job.json")):
        shutil.rmtree(job_directory)
    for name in ("multirun.yaml", "sweep.json", "sweep.lock"):
        (directory / name).unlink(missing_ok=True)
    for name in ("code", "record", "slurm"):
        shutil.rmtree(directory / name, ignore_errors=True)
    with suppress(OSError):
        for empty in (directory, *directory.parents[:2]):
            empty.rmdir()


def submit(sweep: Sweep, numbers: Sequence[int], code: Path) -> None:
    """Start jobs of the sweep on the copy `code` of the code, and log their ids; all of them or none."""
    manifest = sweep.manifest()
    options = _options(manifest["launcher"], manifest["options"])
    started: dict[int, str] = {}
    if isinstance(options, local.LocalOptions):
        started = local.start_supervisor(sweep, numbers, options, code)
        sweep.add_submission(code, started)
    else:
        directories = sweep.jobs()
        jobs = {number: Job(str(directories[number]), slurm=True) for number in numbers}
        try:
            for ids in slurm.submit_arrays(jobs, options, sweep.directory / "slurm", code):
                started |= ids
                sweep.add_submission(code, ids)
        except BaseException:
            if started:
                slurm.scancel(list(dict.fromkeys(id.split("_")[0] for id in started.values())))
            raise
    arrays = ", ".join(dict.fromkeys(id.rpartition("_")[0] or id for id in started.values()))
    if manifest["launcher"] == "slurm":
        log.info("submitted %d jobs to SLURM: %s", len(started), arrays)
    else:
        log.info("started %d jobs on this machine", len(started))
    names = job_names(sweep)
    for number, id in list(started.items())[:20]:
        log.info("  #%d  %s  %s", number, id, names[number])
    if len(started) > 20:
        log.info("  ... and %d more", len(started) - 20)
    log.info("sweep: %s", sweep.directory)
    log.info("reattach: %s", _command("wait", sweep))


def watch(sweep: Sweep, interval: float) -> None:
    """Show the live table until all jobs have ended.

    Raises:
        ChildProcessError: if a job failed or was cancelled, or report=true made no report.
        KeyboardInterrupt: on Ctrl-C; the jobs keep running.
    """
    poller, trouble = StatusPoller(sweep), ""
    statuses: list[JobStatus] = []
    try:
        with LiveTable() as table:
            while True:
                try:
                    statuses, trouble = poller.poll(), ""
                except ConnectionError as error:
                    if not trouble:
                        log.warning("%s; still trying", error)
                    trouble = str(error)
                table.update(statuses, trouble)
                if statuses and not trouble and not any(job.active for job in statuses):
                    break
                time.sleep(interval)
    except KeyboardInterrupt:
        log.warning("jobs keep running; reattach with: %s", _command("wait", sweep))
        raise
    end_sweep(sweep, statuses)
    report_outcome(sweep, statuses)


def report_outcome(sweep: Sweep, statuses: Sequence[JobStatus]) -> None:
    """Log the error and the log file of every failed job, and the path of the report.

    Raises:
        ChildProcessError: if a job failed or was cancelled, or report=true made no report.
    """
    failed = [job for job in statuses if job.failed]
    for job in failed:
        node = f" on {job.node}" if job.node else ""
        error = f": {job.error}" if job.error else ""
        log.error("failed: #%d %s (%s%s)%s", job.number, job.name, job.state, node, error)
        if job.traceback:
            log.error("%s", job.traceback.rstrip())
        log.error("log: %s", job.log)
    report = None if any(job.active for job in statuses) else sweep_report(sweep)
    if report is not None and report[0] is not None:
        log.info("report: %s", report[0])
    if failed:
        raise ChildProcessError(
            f"{len(failed)} of {len(statuses)} jobs of the sweep in {sweep.directory} failed (errors above);"
            f" restart them with {_command('resubmit', sweep)}"
        )
    if report is not None and report[0] is None:
        raise ChildProcessError(
            f"the jobs completed, but no report was made: `{report[1]}` makes it or prints the error"
        )


def status(sweep: Sweep) -> None:
    """Print the status of every job; end the sweep if all jobs have ended."""
    statuses = settled_statuses(sweep)
    end_sweep(sweep, statuses)
    with LiveTable() as table:
        table.print(statuses)
    report_outcome(sweep, statuses)


def cancel(sweep: Sweep, numbers: Sequence[int]) -> None:
    """Cancel the unfinished jobs among `numbers`; with no numbers, all unfinished jobs."""
    active = [job for job in settled_statuses(sweep) if job.active and (not numbers or job.number in numbers)]
    if sweep.manifest()["launcher"] == "slurm":
        every = len(active) == len(sweep.ids())
        slurm.scancel(list(dict.fromkeys(job.id.split("_")[0] if every else job.id for job in active)))
    else:
        local.request_cancel(sweep, [job.number for job in active])
    log.info("cancelled %d jobs of %s", len(active), sweep.directory)


def resubmit(sweep: Sweep, new_code: bool) -> None:
    """Restart the jobs that failed, were cancelled or never ran; they resume from their saved states."""
    statuses = settled_statuses(sweep)
    end_sweep(sweep, statuses)
    numbers = [job.number for job in statuses if job.failed]
    if not numbers:
        log.info("nothing to resubmit in %s: no job failed or was cancelled", sweep.directory)
        return
    with sweep.lock():
        code = _snapshot(sweep) if new_code or not sweep.manifest()["submissions"] else sweep.code()
        if changed := changed_since(REPOSITORY, code):
            log.warning("%s; jobs run the submitted code, or the current code with --new-code", changed)
        submit(sweep, numbers, code)
        _open_record(sweep, sweep.manifest()["overrides"])


def resources(launcher: str, options: Mapping[str, Any], jobs: int) -> tuple[int, float | None]:
    """The number of jobs that run at a time on this machine, and the memory of each under SLURM in bytes.

    The memory is None for the local launcher, and infinite where `mem_gb` leaves the limit to the site.
    """
    checked_options = _options(launcher, options)
    if isinstance(checked_options, local.LocalOptions):
        return checked_options.parallelism(jobs), None
    return 1, float("inf") if checked_options.mem_gb is None else checked_options.mem_gb * 2**30


def _options(launcher: str, options: Mapping[str, Any]) -> slurm.SlurmOptions | local.LocalOptions:
    kind = slurm.SlurmOptions if launcher == "slurm" else local.LocalOptions
    try:
        return kind(**options)
    except Exception as error:
        raise ValueError(explanation(error, "hydra.launcher")) from error


def _open_record(sweep: Sweep, overrides: Sequence[str]) -> None:
    """Create or reopen the sweep's own record, the parent of its runs' records."""
    job = sweep.job(next(iter(sweep.jobs())))
    by_job = [frozenset(sweep.job(number)["overrides"]) for number in sweep.jobs()]
    common = frozenset.intersection(*by_job)  # not part of the name: it lists the varied overrides
    Record.create(
        sweep.directory / "record",
        experiment=job["config"]["name"],
        name=" ".join(["sweep", *(override for override in overrides if override not in common)]),
        params={"overrides": " ".join(overrides)},
        tags={**provenance(REPOSITORY), "sweep": sweep.directory},
        inputs=[],
        tracking_uri=job["tracking_uri"],
        kind="sweep",
    )


def _snapshot(sweep: Sweep) -> Path:
    number = len(list(sweep.directory.glob("code*")))
    code = sweep.directory / ("code" if not number else f"code-{number + 1}")
    jobs = [sweep.job(job) for job in sweep.jobs()]
    modules = dict.fromkeys(name for job in jobs for name in job.get("modules", ()))
    places = dict.fromkeys(place for job in jobs for place in job.get("path", ()))
    sys.path += [place for place in places if place not in sys.path]  # in another shell than the sweep's
    take_snapshot(REPOSITORY, code, modules)
    return code


def log_to_stdout() -> None:
    """Print log messages unformatted to standard output."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout, force=True)
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it logs every table of every font in a PDF
