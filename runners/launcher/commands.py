"""Commands on sweeps: launch, status, wait, cancel and resubmit."""

import logging
import os
import re
import shlex
import shutil
import sys
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from runners.errors import explanation
from runners.launcher import local, queue, slurm
from runners.launcher.finishing import end_sweep, sweep_report
from runners.launcher.jobs import CANCEL, LOCK, TRAINED, State
from runners.launcher.live_table import LiveTable
from runners.launcher.manifest import Sweep
from runners.launcher.ownership import described, holder_of
from runners.launcher.snapshot import changed_since, take_snapshot
from runners.launcher.status import JobStatus, StatusPoller, current_ids, job_names, settled_statuses
from runners.tracking.provenance import provenance
from runners.tracking.record import Record
from runners.tracking.stores import check_tracking_uri

log = logging.getLogger(__name__)
REPOSITORY = Path(__file__).parents[2]
STUCK_AFTER = 3.0  # seconds with a reason that does not resolve after which a job counts as stuck
TASK = "runners.launcher.task"  # the module that a task of an array runs


def _command(name: str, sweep: Sweep) -> str:
    return shlex.join(["weightgeom", "sweep", name, str(sweep.directory)])


def launch(
    directory: Path,
    launcher: str,
    options: Mapping[str, Any],
    jobs: Mapping[int, dict[str, Any]],
    overrides: Sequence[str],
) -> Sweep:
    """Start the jobs, described as JSON, and return the sweep; a refused sweep leaves nothing behind.

    Raises:
        ValueError: if an option is wrong, `directory` holds another sweep, or SLURM refuses the jobs.
        ConnectionError: if SLURM does not answer.
    """
    sweep = Sweep(directory)
    with sweep.lock():
        if any((Path(job["directory"]) / "job.json").exists() for job in jobs.values()):
            raise ValueError(
                f"{directory} holds a sweep already: set hydra.sweep.dir= to another directory, or restart"
                f" that sweep's failed jobs with {_command('resubmit', sweep)}"
            )
        limits = _limits(launcher, options)
        configs = [job["config"] for job in jobs.values()]
        _check_second_jobs(options, configs)
        _check_tasks(launcher, options, configs)
        if options.get("after"):
            options = {**options, "after": str(Sweep.find(Path(options["after"])).directory)}
        fresh = not (directory / "sweep.json").exists()
        try:
            sweep.create(launcher, options, overrides)
            for number, job in jobs.items():
                uri = check_tracking_uri(job["config"]["tracking_uri"])  # absolute, for other directories
                sweep.add_job(number, {**job, **limits, "tracking_uri": uri})
            sweep.list_jobs({number: job["directory"] for number, job in jobs.items()})
            _open_record(sweep, overrides)
            submit(sweep, list(jobs), _snapshot(sweep))
        except BaseException:
            if fresh and all(known.get("withdrawn") for known in sweep.manifest()["submissions"]):
                _remove(sweep)
            else:
                log.warning("jobs may have started: %s shows them", _command("status", sweep))
            raise
    return sweep


def remove_unlaunched(directory: Path) -> None:
    """Remove Hydra's files of a sweep that failed to launch, and the directories that this empties."""
    if not (directory / "sweep.json").exists():
        for name in ("multirun.yaml", "sweep.lock", "sweep.lock.owner"):
            (directory / name).unlink(missing_ok=True)
        with suppress(OSError):
            for empty in (directory, *directory.parents[:2]):
                empty.rmdir()


def _remove(sweep: Sweep) -> None:
    for job_directory in (path.parent for path in sweep.directory.glob("*/job.json")):
        shutil.rmtree(job_directory)
    for name in ("code", "record", "slurm"):
        shutil.rmtree(sweep.directory / name, ignore_errors=True)
    (sweep.directory / "sweep.json").unlink(missing_ok=True)


def submit(sweep: Sweep, numbers: Sequence[int], code: Path) -> None:
    """Start jobs of the sweep on the copy `code` of the code, and log their ids; all of them or none.

    Needs the sweep's lock.

    Raises:
        ValueError: if SLURM refuses the jobs, or one of them still runs.
        ConnectionError: if SLURM does not answer; where it may have taken the jobs, `adopt` finds them.
    """
    manifest, directories = sweep.manifest(), sweep.jobs()
    for number in numbers:
        if (holder := holder_of(directories[number] / LOCK)) is not None:
            raise ValueError(
                f"job {number} still runs as {described(holder)}: end that process, or wait for its end"
            )
        (directories[number] / CANCEL).unlink(missing_ok=True)
    options = _options(manifest["launcher"], manifest["options"])
    if isinstance(options, local.LocalOptions):
        started = local.new_ids(numbers)
        place = sweep.add_submission(code, ids=_as_text(started))  # first: a killed launcher leaves its jobs
        try:
            local.start_supervisor(sweep, started, options, code)
        except Exception:
            sweep.amend_submission(place, ids={}, withdrawn=True)
            raise
        log.info("started %d jobs on this machine", len(started))
    else:
        started = _submit_arrays(sweep, numbers, options, code)
        arrays = ", ".join(dict.fromkeys(id.partition("_")[0] for id in started.values()))
        log.info("submitted %d jobs to SLURM: %s", len(started), arrays)
    names = job_names(sweep)
    for number, id in list(started.items())[:20]:
        log.info("  #%d  %s  %s", number, id, names[number])
    if len(started) > 20:
        log.info("  ... and %d more", len(started) - 20)
    log.info("sweep: %s", sweep.directory)
    log.info("reattach: %s", _command("wait", sweep))


def _submit_arrays(
    sweep: Sweep, numbers: Sequence[int], options: slurm.SlurmOptions, code: Path
) -> dict[int, str]:
    """Submit the jobs as arrays of the largest size that the site allows; returns their ids by number.

    Each array is listed in the manifest before it is submitted.
    """
    queue.require("sbatch")
    if ignored := slurm.ignored_variables():
        log.warning("not used: %s; set options of sbatch with hydra.launcher.OPTION=", ", ".join(ignored))
    if options.after is not None and (earlier := _unfinished(Path(options.after))):
        options = options.depending(f"afterok:{':'.join(earlier)}")
    described_jobs = [sweep.job(number) for number in numbers]
    label = options.name or str(described_jobs[0]["config"]["name"])
    places = list(
        dict.fromkeys(job[key] for job in described_jobs for key in ("outputs", "cwd") if key in job)
    )
    started: dict[int, str] = {}
    arrays: list[str] = []
    latest: dict[str | None, str] = {}  # array of each part
    planned = _planned(sweep, numbers, options)
    for part, tasks in planned:
        chosen = options.measuring() if part == "measuring" else options
        if (part, tasks) != planned[-1] or options.report_job is not None:
            chosen = chosen.unmailed()  # one mail for the sweep
        if part in latest:  # in parallel, the arrays together would exceed array_parallelism
            chosen = chosen.depending(f"afterany:{latest[part]}")
        follows = part == "measuring" and all(number in started for task in tasks for number in task)
        if follows:
            chosen = chosen.after_each(latest["training"], len(tasks))
        name = _unique(label)
        place = sweep.add_submission(code, name=name, tasks=tasks, **({"part": part} if part else {}))
        folder = sweep.directory / "slurm"
        try:
            array = slurm.submit_array(name, len(tasks), chosen, folder, code, TASK, places)
        except ConnectionError as error:
            advice = _command("status", sweep), _command("resubmit", sweep)
            raise ConnectionError(
                f"{error}; `{advice[0]}` looks for them, `{advice[1]}` starts the others"
            ) from error
        except BaseException as error:
            if isinstance(error, Exception):
                sweep.amend_submission(place, withdrawn=True)
            if arrays:
                _withdraw(sweep, arrays)
            raise
        ids = slurm.ids_of(array, tasks)
        sweep.amend_submission(place, ids=_as_text(ids))
        started = ids | started  # of a job in two parts the first
        arrays.append(array)
        latest[part] = array
        if follows:
            log.info("the jobs of %s measure what those of %s have trained", array, latest["training"])
    if options.report_job is not None:
        _submit_report_job(sweep, arrays, options, code, label)
    return started


def _planned(
    sweep: Sweep, numbers: Sequence[int], options: slurm.SlurmOptions
) -> list[tuple[str | None, list[list[int]]]]:
    """The arrays to submit: the part of a run that their jobs do, None for all, and the jobs of each task."""
    size, each, directories = slurm.largest_array(), options.jobs_per_task, sweep.jobs()
    trained = [
        number
        for number in numbers
        if options.measure is not None and (directories[number] / TRAINED).exists()
    ]
    untrained = [number for number in numbers if number not in trained]
    parts = [None] if options.measure is None else ["training", "measuring"]
    planned: list[tuple[str | None, list[list[int]]]] = []
    for group, group_parts in ((untrained, parts), (trained, ["measuring"])):
        packs = [list(group[start : start + each]) for start in range(0, len(group), each)]
        for start in range(0, len(packs), size):
            planned += [(part, packs[start : start + size]) for part in group_parts]
    return planned


def _unique(label: str) -> str:
    """A name for the queue."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', label)[:80]}-{uuid.uuid4().hex[:8]}"


def _submit_report_job(
    sweep: Sweep, arrays: Sequence[str], options: slurm.SlurmOptions, code: Path, label: str
) -> None:
    """Submit the job that ends the sweep after the `arrays`; without it, `wait` and `status` do so."""
    name = _unique(f"{label}-report")
    sweep.set_report_job(name, "")
    chosen = replace(options.reporting(), dependency=f"afterany:{':'.join(arrays)}")
    try:
        id = slurm.submit_array(name, 1, chosen, sweep.directory / "slurm", code, TASK)
    except (ValueError, ConnectionError) as error:
        log.warning("no job writes the report, but `%s` will: %s", _command("wait", sweep), error)
        return
    sweep.set_report_job(name, id)
    log.info("%s writes the report when all have ended", id)


def _report_job(sweep: Sweep) -> str:
    """The id of the job that will end the sweep, if it is in the queue and this process is not it."""
    id = str(sweep.manifest().get("report_job", {}).get("id", ""))
    if not id or id == os.environ.get("SLURM_JOB_ID"):
        return ""
    reported = queue.queued([id]).get(id)
    return id if reported is not None and not queue.stuck(reported.reason, id) else ""


def _limits(launcher: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The time limits in the description of a job."""
    checked = _options(launcher, options)
    if isinstance(checked, local.LocalOptions) or checked.measure is None:
        return {"limits": checked.limits()}
    return {"limits": checked.limits(), "measuring_limits": checked.measuring().limits()}


def _check_second_jobs(options: Mapping[str, Any], configs: Sequence[Mapping[str, Any]]) -> None:
    if options.get("measure") is not None and any(config.get("device") == "cuda" for config in configs):
        raise ValueError(
            "device=cuda would hold for training and measuring, to which hydra.launcher.measure gives other"
            " resources: set device=auto, and each uses what it has"
        )
    if options.get("report_job") is not None and not all(config.get("report") for config in configs):
        raise ValueError("hydra.launcher.report_job writes the report of a sweep with report=true: add it")


def _check_tasks(launcher: str, options: Mapping[str, Any], configs: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError where a job has several tasks, and no training on as many processes."""
    checked = _options(launcher, options)
    if isinstance(checked, local.LocalOptions) or checked.tasks == 1:
        return
    number = checked.tasks
    for config in configs:
        trainings = {"model.pretraining": config["model"].get("pretraining") or {}}
        if config["objective"].get("_target_"):
            trainings["training"] = config["training"]
        several = {key: more for key, made in trainings.items() if (more := made.get("processes", 1)) > 1}
        given = f"hydra.launcher.nodes={checked.nodes} and tasks_per_node={checked.tasks_per_node}"
        for key, processes in several.items():
            if processes != number:
                raise ValueError(
                    f"{given} are {number} processes of a training, and {key}.processes={processes}: set"
                    f" {key}.processes={number}, or other numbers of nodes and tasks"
                )
        if not several:
            raise ValueError(
                f"{given} are {number} processes of a training, and this run has none on several: set"
                " hydra.launcher.nodes=1 and tasks_per_node=1"
            )


def tasks(launcher: str, options: Mapping[str, Any]) -> int:
    """The tasks of each job, which are the processes of its training."""
    checked = _options(launcher, options)
    return 1 if isinstance(checked, local.LocalOptions) else checked.tasks


def _unfinished(directory: Path) -> list[str]:
    """The arrays of the sweep in `directory` that have not ended.

    Raises:
        ValueError: if jobs of that sweep failed or were cancelled.
    """
    earlier = Sweep.find(directory)
    with earlier.lock():
        adopt(earlier)
        statuses = settled_statuses(earlier)
    if failed := [str(job.number) for job in statuses if job.failed]:
        raise ValueError(
            f"jobs {', '.join(failed)} of the sweep in {directory} did not complete: restart them with"
            f" {_command('resubmit', earlier)} first"
        )
    ids = earlier.ids()  # of a run in two jobs the second
    return list(dict.fromkeys(ids[job.number].partition("_")[0] for job in statuses if job.active))


def _withdraw(sweep: Sweep, arrays: Sequence[str]) -> None:
    """Cancel arrays of an incomplete launch."""
    for place, known in enumerate(sweep.manifest()["submissions"]):
        if any(id.partition("_")[0] in arrays for id in known["ids"].values()):
            sweep.amend_submission(place, withdrawn=True)
    queue.scancel(arrays)


def adopt(sweep: Sweep) -> None:
    """Find the arrays of submissions whose ids are not known, because the launcher was killed or SLURM slow.

    Needs the sweep's lock; mutates the manifest.

    Raises:
        ConnectionError: if SLURM does not answer.
    """
    submissions = list(enumerate(sweep.manifest()["submissions"]))
    unknown = {
        known["name"]: place
        for place, known in submissions
        if known.get("name") and not known["ids"] and not known.get("withdrawn")
    }
    if not unknown:
        return
    arrays = queue.named(list(unknown), _day_before(submissions[0][1]["time"]))
    directories, ids = sweep.jobs(), {id for _, known in submissions for id in known["ids"].values()}
    for name in unknown.keys() - arrays.keys():  # jobs that have ended where there is no accounting
        numbers = (number for task in submissions[unknown[name]][1]["tasks"] for number in task)
        begun = (State.load(directories[number]) for number in numbers)
        if strange := [state.id for state in begun if state is not None and state.id not in ids]:
            arrays[name] = strange[0].partition("_")[0]
    if arrays and (sweep.directory / "record").exists():
        _open_record(sweep, sweep.manifest()["overrides"])
    for name, array in arrays.items():
        tasks = submissions[unknown[name]][1]["tasks"]
        sweep.amend_submission(unknown[name], ids=_as_text(slurm.ids_of(array, tasks)))
        with suppress(FileNotFoundError):
            script = sweep.directory / "slurm" / f"{name}.sh"
            script.rename(script.with_name(f"{array}_submission.sh"))
        log.info("found the jobs of an interrupted submission in SLURM: %s", array)


def _day_before(moment: str) -> str:
    """The day before a moment of the manifest, as sacct takes it: clocks and time zones differ."""
    seconds = time.mktime(time.strptime(moment.rpartition(" ")[0], "%Y-%m-%d %H:%M:%S"))
    return time.strftime("%Y-%m-%d", time.localtime(seconds - 86400))


def _as_text(ids: Mapping[int, str]) -> dict[str, str]:
    return {str(number): id for number, id in ids.items()}


def watch(sweep: Sweep, interval: float) -> None:
    """Show the live table until all jobs have ended.

    Raises:
        ChildProcessError: if a job failed, was cancelled or can never start, or report=true made no report.
        KeyboardInterrupt: on Ctrl-C; the jobs keep running.
    """
    with sweep.lock():
        adopt(sweep)
    announced: set[str] = set()
    try:
        with LiveTable() as table:
            while True:
                _show_until_ended(sweep, table, interval)
                # Another command may have restarted jobs meanwhile, and SLURM may not answer.
                with suppress(ConnectionError), sweep.lock():
                    statuses = settled_statuses(sweep)
                    closing = "" if any(job.active for job in statuses) else _report_job(sweep)
                    if closing and closing not in announced:
                        log.info("waiting for %s, which writes the report", closing)
                        announced.add(closing)
                    elif not closing and not any(job.active and not job.stuck for job in statuses):
                        end_sweep(sweep, statuses)
                        break
                time.sleep(interval)
    except KeyboardInterrupt:
        log.warning("jobs keep running; reattach with: %s", _command("wait", sweep))
        raise
    report_outcome(sweep, statuses)


def _show_until_ended(sweep: Sweep, table: LiveTable, interval: float) -> None:
    poller, trouble = StatusPoller(sweep), ""
    warned: set[str] = set()
    stuck_since: dict[int, float] = {}  # the first reason that SLURM gives may not be its last
    while True:
        statuses: list[JobStatus] = []
        try:
            statuses, trouble = poller.poll(), ""
        except ConnectionError as error:
            if not trouble:
                log.warning("%s; still trying", error)
            trouble = str(error)
        table.update(statuses, trouble)
        now = time.monotonic()
        stuck_since = {job.number: stuck_since.get(job.number, now) for job in statuses if job.stuck}
        stuck = {number for number, since in stuck_since.items() if now - since >= STUCK_AFTER}
        for job in statuses:
            if job.number in stuck and job.stuck not in warned:
                warned.add(job.stuck)
                log.warning("#%d cannot start as it is (%s)", job.number, job.stuck)
        if statuses and not any(job.active and job.number not in stuck for job in statuses):
            return
        time.sleep(min(interval, STUCK_AFTER) if stuck_since.keys() - stuck else interval)


def report_outcome(sweep: Sweep, statuses: Sequence[JobStatus], over: bool = True) -> None:
    """Log the error and the log file of every failed job, and the report of a sweep that is `over`.

    Raises:
        ChildProcessError: if a job failed, was cancelled or can never start, or report=true made no report.
    """
    failed = [job for job in statuses if job.failed]
    cancelled = [job for job in failed if job.cancelled]
    for job in failed:
        node = f" on {job.node}" if job.node else ""
        error = f": {job.error}" if job.error else ""
        kind = "cancelled" if job.cancelled else "failed"
        log.error("%s: #%d %s (%s%s)%s", kind, job.number, job.name, job.state, node, error)
        if job.traceback:
            log.error("%s", job.traceback.rstrip())
        if job.log is not None and job.log.exists():
            log.error("log: %s", job.log)
    stuck = [job for job in statuses if job.stuck]
    for job in stuck:
        log.error("cannot start: #%d %s (%s)", job.number, job.name, job.stuck)
    report = sweep_report(sweep) if over and not any(job.active for job in statuses) else None
    if report is not None and report[0] is not None:
        log.info("report: %s", report[0])
    if failed:
        number = f"{len(failed)} of {len(statuses)} jobs of the sweep in {sweep.directory}"
        ended = "were cancelled" if len(cancelled) == len(failed) else "failed (errors above)"
        raise ChildProcessError(f"{number} {ended}; restart them with {_command('resubmit', sweep)}")
    if stuck:
        raise ChildProcessError(
            f"{len(stuck)} of {len(statuses)} jobs of the sweep in {sweep.directory} cannot start (reasons"
            f" above): `{_command('cancel', sweep)}` removes them, and `{_command('resubmit', sweep)}` with"
            " options that fit (--timeout_min, --mem_gb, --cpus_per_task, --partition) starts them again"
        )
    if report is not None and report[0] is None:
        raise ChildProcessError(
            f"the jobs completed, but no report was made: `{report[1]}` makes it or prints the error"
        )


def status(sweep: Sweep) -> None:
    """Print the status of every job; end the sweep if all jobs have ended."""
    with sweep.lock():
        adopt(sweep)
        statuses = settled_statuses(sweep)
        closing = "" if any(job.active for job in statuses) else _report_job(sweep)
        if not closing:
            end_sweep(sweep, statuses)
    with LiveTable() as table:
        table.print(statuses)
    if closing:
        log.info("%s will write the report", closing)
    report_outcome(sweep, statuses, not closing)


def cancel(sweep: Sweep, numbers: Sequence[int]) -> None:
    """Cancel the unfinished jobs among `numbers`; with no numbers, all unfinished jobs.

    Raises:
        ValueError: if the sweep has no job with one of the numbers.
    """
    if unknown := [number for number in numbers if number not in sweep.jobs()]:
        known, missing = sweep.jobs(), ", ".join(map(str, unknown))
        raise ValueError(f"{sweep.directory} has no job {missing}; its jobs are {min(known)} to {max(known)}")
    with sweep.lock():
        adopt(sweep)
        statuses = settled_statuses(sweep)
        active = [
            job
            for job in statuses
            if job.active and not _completed(sweep, job) and (not numbers or job.number in numbers)
        ]
        if sweep.manifest()["launcher"] == "slurm":
            _cancel_in_slurm(sweep, statuses, active, every=not numbers)
        else:
            local.request_cancel(sweep, [job.number for job in active])
    log.info("cancelled %d jobs of %s", len(active), sweep.directory)


def _completed(sweep: Sweep, job: JobStatus) -> bool:
    """Whether the job is over, and only its process has not ended yet."""
    state = State.load(sweep.jobs()[job.number])
    return state is not None and (state.state, state.id) == ("COMPLETED", job.id)


def _cancel_in_slurm(
    sweep: Sweep, statuses: Sequence[JobStatus], active: Sequence[JobStatus], every: bool
) -> None:
    for place, known in enumerate(sweep.manifest()["submissions"]):
        if every and not known["ids"]:  # SLURM may still take it: its tasks then do not start
            sweep.amend_submission(place, withdrawn=True)
    ids = current_ids(sweep)
    whole = len(active) == len(ids)
    directories = sweep.jobs()
    sharing = Counter(ids.values())
    together = Counter(job.id for job in active)
    ended = Counter(job.id for job in statuses if not job.active)
    alone = [job for job in active if together[job.id] + ended[job.id] == sharing[job.id]]
    for job in active:
        if job not in alone:  # its task has other jobs
            (directories[job.number] / CANCEL).touch()
    second = [sweep.ids()[job.number] for job in alone]  # of a job in two parts its measurements
    closing = [id for id in [sweep.manifest().get("report_job", {}).get("id")] if every and id]
    both = [*(job.id for job in alone), *second]
    queue.scancel(list(dict.fromkeys([*(id.split("_")[0] if whole else id for id in both), *closing])))


def resubmit(sweep: Sweep, new_code: bool, options: Mapping[str, Any] = {}) -> None:
    """Restart the jobs that failed, were cancelled or never ran; they resume from their saved states.

    `options` of the launcher, such as `timeout_min`, replace those of the sweep from now on.
    """
    with sweep.lock():
        changed_options = {**sweep.manifest()["options"], **options}
        launcher, configs = sweep.manifest()["launcher"], [sweep.job(job)["config"] for job in sweep.jobs()]
        limits = _limits(launcher, changed_options)
        _check_second_jobs(changed_options, configs)
        _check_tasks(launcher, changed_options, configs)
        adopt(sweep)
        statuses = settled_statuses(sweep)
        end_sweep(sweep, statuses)
        numbers = [job.number for job in statuses if job.failed]
        if not numbers:
            log.info("nothing to resubmit in %s: no job failed or was cancelled", sweep.directory)
            return
        if options:
            sweep.set_options(changed_options)
            for number in numbers:
                sweep.add_job(number, {**sweep.job(number), **limits})
        code = _snapshot(sweep) if new_code or not sweep.manifest()["submissions"] else sweep.code()
        if changed := changed_since(REPOSITORY, code):
            log.warning("%s; jobs run the submitted code, or the current code with --new-code", changed)
        if not Record(sweep.directory / "record").described():  # jobs look for that of their sweep
            _open_record(sweep, sweep.manifest()["overrides"])
        submit(sweep, numbers, code)
        _open_record(sweep, sweep.manifest()["overrides"])


def resources(launcher: str, options: Mapping[str, Any], jobs: int) -> tuple[int, float | None, int]:
    """The number of jobs that run at a time on this machine, and the memory and nodes of each under SLURM.

    The memory, in bytes on each node, is None for the local launcher, and infinite where `mem_gb` leaves the
    limit to the site.
    """
    checked_options = _options(launcher, options)
    if isinstance(checked_options, local.LocalOptions):
        return checked_options.parallelism(jobs), None, 1
    memory = float("inf") if checked_options.mem_gb is None else checked_options.mem_gb * 2**30
    return 1, memory, checked_options.nodes


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
