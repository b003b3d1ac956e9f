"""Commands on sweeps: start one, see how it stands, wait for it, cancel it, start again what failed of it."""

import logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from runners.errors import complaint
from runners.launcher import local as supervisor
from runners.launcher import slurm
from runners.launcher.board import Board
from runners.launcher.finishing import finish, report_of
from runners.launcher.jobs import Job
from runners.launcher.manifest import Sweep
from runners.launcher.snapshot import changed_since, take_snapshot
from runners.launcher.status import Row, Watcher, names_of, settled
from runners.tracking.provenance import provenance
from runners.tracking.publisher import check_tracking_uri
from runners.tracking.record import Record

log = logging.getLogger(__name__)
REPOSITORY = Path(__file__).parents[2]
COME_BACK = "python -m runners.launcher wait {}"


def launch(
    directory: Path,
    launcher: str,
    options: Mapping[str, Any],
    jobs: Mapping[int, dict[str, Any]],
    overrides: Sequence[str],
) -> Sweep:
    """Start the jobs, described as JSON, and return the sweep.

    Raises:
        ValueError: if an option is wrong, or SLURM refuses the jobs.
        ConnectionError: if SLURM does not answer.
    """
    sweep = Sweep(directory)
    if any((Path(job["directory"]) / "job.json").exists() for job in jobs.values()):
        raise ValueError(f"{directory} holds a sweep already: give another hydra.sweep.dir, or resubmit that")
    limits = _options(launcher, options).limits()
    sweep.create(launcher, options, overrides)
    for number, job in jobs.items():
        uri = check_tracking_uri(job["config"]["tracking_uri"])  # absolute: a shell elsewhere comes back
        sweep.add_job(number, {**job, "limits": limits, "tracking_uri": uri})
    sweep.list_jobs({number: job["directory"] for number, job in jobs.items()})
    _open_record(sweep, overrides)
    submit(sweep, list(jobs), _snapshot(sweep))
    return sweep


def discard(directory: Path) -> None:
    """Delete what is there of a sweep that did not start, and the directories that hold nothing else."""
    for place in (path.parent for path in directory.glob("*/job.json")):
        shutil.rmtree(place)
    for name in ("multirun.yaml", "sweep.json", "sweep.lock"):
        (directory / name).unlink(missing_ok=True)
    for name in ("code", "record", "slurm"):
        shutil.rmtree(directory / name, ignore_errors=True)
    with suppress(OSError):
        for empty in (directory, *directory.parents[:2]):
            empty.rmdir()


def submit(sweep: Sweep, numbers: Sequence[int], code: Path) -> None:
    """Start jobs of the sweep on a copy of the code, and say where they are; all of them or none."""
    manifest = sweep.manifest()
    options = _options(manifest["launcher"], manifest["options"])
    started: dict[int, str] = {}
    if isinstance(options, supervisor.LocalOptions):
        started = supervisor.start(sweep, numbers, options, code)
        sweep.add_submission(code, started)
    else:
        places = sweep.jobs()
        jobs = {number: Job(str(places[number]), slurm=True) for number in numbers}
        try:
            for ids in slurm.submit(jobs, options, sweep.directory / "slurm", code):
                started |= ids
                sweep.add_submission(code, ids)
        except BaseException:
            if started:
                slurm.cancel(list(dict.fromkeys(id.split("_")[0] for id in started.values())))
            raise
    shown = ", ".join(dict.fromkeys(id.rpartition("_")[0] or id for id in started.values()))
    if manifest["launcher"] == "slurm":
        log.info("submitted %d jobs to SLURM: %s", len(started), shown)
    else:
        log.info("started %d jobs on this machine", len(started))
    names = names_of(sweep)
    for number, id in list(started.items())[:20]:
        log.info("  #%d  %s  %s", number, id, names[number])
    if len(started) > 20:
        log.info("  ... and %d more", len(started) - 20)
    log.info("sweep: %s", sweep.directory)
    log.info("come back: %s", COME_BACK.format(sweep.directory))


def watch(sweep: Sweep, interval: float) -> None:
    """Show how the jobs stand until all have ended.

    Raises:
        ChildProcessError: if one failed or was cancelled.
        KeyboardInterrupt: on Ctrl-C, which leaves the jobs as they are.
    """
    watcher, trouble = Watcher(sweep), ""
    rows: list[Row] = []
    try:
        with Board() as board:
            while True:
                try:
                    rows, trouble = watcher.look(), ""
                except ConnectionError as error:
                    if not trouble:
                        log.warning("%s; still trying", error)
                    trouble = str(error)
                board.show(rows, trouble)
                if rows and not trouble and not any(row.active for row in rows):
                    break
                time.sleep(interval)
    except KeyboardInterrupt:
        log.warning("the jobs go on; come back with: %s", COME_BACK.format(sweep.directory))
        raise
    finish(sweep, rows)
    conclude(sweep, rows)


def conclude(sweep: Sweep, rows: Sequence[Row]) -> None:
    """Tell of every job that did not complete, why and where, and at the end where the report is.

    Raises:
        ChildProcessError: if a job did not complete, or there is no report that was asked for.
    """
    failed = [row for row in rows if row.failed]
    for row in failed:
        where = f" on {row.node}" if row.node else ""
        error = f": {row.error}" if row.error else ""
        log.error("failed: #%d %s (%s%s)%s", row.number, row.name, row.state, where, error)
        if row.traceback:
            log.error("%s", row.traceback.rstrip())
        log.error("log: %s", row.log)
    report = None if any(row.active for row in rows) else report_of(sweep)
    if report is not None and report[0] is not None:
        log.info("report: %s", report[0])
    if failed:
        raise ChildProcessError(
            f"{len(failed)} of {len(rows)} jobs of the sweep in {sweep.directory} failed, as told above;"
            f" python -m runners.launcher resubmit {sweep.directory} starts them again"
        )
    if report is not None and report[0] is None:
        raise ChildProcessError(
            f"the jobs completed, but no report was made: `{report[1]}` makes it or says why"
        )


def status(sweep: Sweep) -> None:
    """Show how the jobs stand; end the sweep if all have ended."""
    rows = settled(sweep)
    finish(sweep, rows)
    with Board() as board:
        board.print(rows)
    conclude(sweep, rows)


def cancel(sweep: Sweep, numbers: Sequence[int]) -> None:
    """Cancel the jobs `numbers`, or all, that have not ended."""
    rows = [row for row in settled(sweep) if row.active and (not numbers or row.number in numbers)]
    if sweep.manifest()["launcher"] == "slurm":
        every = len(rows) == len(sweep.ids())
        slurm.cancel(list(dict.fromkeys(row.id.split("_")[0] if every else row.id for row in rows)))
    else:
        supervisor.cancel(sweep, [row.number for row in rows])
    log.info("cancelled %d jobs of %s", len(rows), sweep.directory)


def resubmit(sweep: Sweep, new_code: bool) -> None:
    """Start again what failed, was cancelled or never ran; it goes on from what it has saved."""
    rows = settled(sweep)
    finish(sweep, rows)
    numbers = [row.number for row in rows if row.failed]
    if not numbers:
        log.info("nothing to resubmit in %s: no job failed or was cancelled", sweep.directory)
        return
    with sweep.lock():
        code = _snapshot(sweep) if new_code or not sweep.manifest()["submissions"] else sweep.code()
        if changed := changed_since(REPOSITORY, code):
            log.warning("%s; the jobs run what was submitted, or with --new-code what is there now", changed)
        submit(sweep, numbers, code)
        _open_record(sweep, sweep.manifest()["overrides"])


def room(launcher: str, options: Mapping[str, Any], jobs: int) -> tuple[int, float | None]:
    """How many of the jobs run at a time on this machine, and the bytes of memory of each under SLURM.

    These are None here, and infinite where the site has a limit of its own.
    """
    found = _options(launcher, options)
    if isinstance(found, supervisor.LocalOptions):
        return found.parallelism(jobs), None
    return 1, float("inf") if found.mem_gb is None else found.mem_gb * 2**30


def _options(launcher: str, options: Mapping[str, Any]) -> "slurm.SlurmOptions | supervisor.LocalOptions":
    kind = slurm.SlurmOptions if launcher == "slurm" else supervisor.LocalOptions
    try:
        return kind(**options)
    except Exception as error:
        raise ValueError(complaint(error, "hydra.launcher")) from error


def _open_record(sweep: Sweep, overrides: Sequence[str]) -> None:
    """Start the sweep's own record, the parent of its runs' records, or open it again."""
    job = sweep.job(next(iter(sweep.jobs())))
    asked = [frozenset(sweep.job(number)["overrides"]) for number in sweep.jobs()]
    common = frozenset.intersection(*asked)  # not what tells this sweep from others
    Record.create(
        sweep.directory / "record",
        experiment=job["config"]["name"],
        name=" ".join(["sweep", *(one for one in overrides if one not in common)]),
        params={"overrides": " ".join(overrides)},
        tags={**provenance(REPOSITORY), "sweep": sweep.directory},
        inputs=[],
        tracking_uri=job["tracking_uri"],
        kind="sweep",
    )


def _snapshot(sweep: Sweep) -> Path:
    number = len(list(sweep.directory.glob("code*")))
    code = sweep.directory / ("code" if not number else f"code-{number + 1}")
    take_snapshot(REPOSITORY, code)
    return code


def speak() -> None:
    """Have log lines shown as they are, on standard output."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout, force=True)
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # tells of every table of every font in a PDF
