"""Jobs under SLURM: their options and their submission as arrays."""

import logging
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from runners.errors import explanation
from runners.launcher.jobs import BY_SCRIPT, GO_ON
from runners.launcher.queue import PLAIN, TIMEOUT, named, output_of, require, undisturbed
from runners.launcher.snapshot import python_of

log = logging.getLogger(__name__)
# Options that are not sbatch's, or have another name there.
OURS = {
    "after",
    "measure",
    "report_job",
    "container",
    "container_runtime",
    "container_args",
    "timeout_min",
    "mem_gb",
    "tasks_per_node",
    "name",
    "max_num_timeout",
    "signal_delay_s",
    "array_parallelism",
    "jobs_per_task",
    "setup",
    "srun_args",
    "stderr_to_stdout",
    "additional_parameters",
}
# Errors of sbatch after which SLURM may have taken the jobs nevertheless.
UNCERTAIN = re.compile(r"time[d -]*out|contact|connect|communicat|zero bytes|unexpected message|socket", re.I)
# The launcher's options of a sweep, which a second kind of job has in common with the first.
COMMON = {"measure", "report_job", "after", "jobs_per_task", "name", "dependency", "mail_type", "mail_user"}
ALONE = {"nodes": 1, "tasks_per_node": 1}  # of jobs that train nothing
# Requeues a job that ended with GO_ON in a container, which has no commands of SLURM's.
REQUEUE = f"""code=$?
job="${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
for pause in 1 2 4 8; do [ $code = {GO_ON} ] && ! scontrol requeue "$job" && sleep $pause || break; done
exit $code"""
AGAIN_AFTER = (0.5, 1.5, 3.0)  # seconds before each look for jobs whose submission failed


def _joined(value: Any) -> Any:
    """A list as SLURM writes it: with commas."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


Text = Annotated[str, BeforeValidator(_joined)]  # a number, such as an account, is text as well


@dataclass(frozen=True, config=ConfigDict(extra="forbid", coerce_numbers_to_str=True))
class SlurmOptions:
    """Resources and limits of the jobs, named as in hydra-submitit-launcher; None leaves them to the site."""

    timeout_min: int = Field(default=60, ge=1)
    max_num_timeout: int = Field(default=3, ge=0)  # restarts of a job that reaches its time limit
    signal_delay_s: int = Field(default=120, ge=1)  # between the signal to save and the end
    array_parallelism: int = Field(default=256, ge=1)  # tasks at a time
    jobs_per_task: int = Field(default=1, ge=1)  # one after another in one allocation, sharing its limit
    name: str | None = None  # in the queue; None takes the experiment's
    cpus_per_task: int | None = None
    gpus_per_node: int | str | None = None
    mem_gb: float | None = None
    nodes: int = Field(default=1, ge=1)
    tasks_per_node: int = Field(default=1, ge=1)  # each holds one process of a training
    partition: Text | None = None
    qos: Text | None = None
    account: Text | None = None
    constraint: Text | None = None
    gres: Text | None = None
    exclude: Text | None = None
    nodelist: Text | None = None
    exclusive: bool | str | None = None
    dependency: Text | None = None
    after: str | None = None  # the directory of a sweep all of whose jobs must have completed
    measure: dict[str, Any] | None = None  # options of second jobs, which measure the trainings
    report_job: dict[str, Any] | None = None  # options of a last job, which writes the report
    container: str | None = None  # an image whose python3 has the requirements
    container_runtime: Literal["apptainer", "singularity", "pyxis"] = "apptainer"
    container_args: list[str] | None = None
    comment: Text | None = None
    cpus_per_gpu: int | None = None
    gpus_per_task: int | str | None = None
    mem_per_gpu: Text | None = None
    mem_per_cpu: Text | None = None
    mail_type: Text | None = None
    mail_user: Text | None = None
    setup: list[str] | None = None  # shell lines before the job
    srun_args: list[str] | None = None
    stderr_to_stdout: bool = True  # one log per job
    additional_parameters: dict[str, Any] | None = None  # further options of sbatch

    def __post_init__(self) -> None:
        """Refuse tasks that cannot share a training, and wrong options of second jobs."""
        if self.tasks > 1 and self.jobs_per_task > 1:
            raise ValueError(
                f"jobs_per_task runs jobs in turn in one task, and nodes={self.nodes} and"
                f" tasks_per_node={self.tasks_per_node} run one in {self.tasks}: set only one"
            )
        if isinstance(self.gpus_per_node, int) and 0 < self.gpus_per_node < self.tasks_per_node:
            raise ValueError(
                f"tasks_per_node={self.tasks_per_node} take a GPU each, and gpus_per_node is"
                f" {self.gpus_per_node}: set hydra.launcher.gpus_per_node={self.tasks_per_node}"
            )
        second = ("measure", self.measure, self.measuring), ("report_job", self.report_job, self.reporting)
        for name, options, made in second:
            if common := sorted(COMMON & (options or {}).keys()):
                raise ValueError(
                    f"{name}.{common[0]} is an option of the whole sweep: set hydra.launcher.{common[0]}"
                )
            try:
                made()
            except ValidationError as error:
                raise ValueError(explanation(error, name)) from error
        if self.measure is not None and self.jobs_per_task > 1:
            raise ValueError("measure and jobs_per_task exclude each other: leave out hydra.launcher.measure")

    @property
    def tasks(self) -> int:
        """The tasks of a job, which are the processes of its training."""
        return self.nodes * self.tasks_per_node

    def measuring(self) -> "SlurmOptions":
        """The options of jobs that only measure, after others have trained: one task."""
        return self if self.measure is None else replace(self, **{"measure": None, **ALONE, **self.measure})

    def reporting(self) -> "SlurmOptions":
        """The options of the job that writes the report: one task and no GPU, unless `report_job` has one."""
        if self.report_job is None:
            return self
        gpus = dict.fromkeys(("gpus_per_node", "gpus_per_task", "cpus_per_gpu", "mem_per_gpu", "gres"))
        without: dict[str, Any] = {**gpus, **ALONE, "container": None, "measure": None, "report_job": None}
        return replace(self, **{**without, **self.report_job})

    def unmailed(self) -> "SlurmOptions":
        """The same options without mail."""
        return replace(self, mail_type=None, mail_user=None)

    def limits(self) -> dict[str, Any]:
        """The time limits of a job; its signal to save comes after half of `timeout_min` at the earliest."""
        delay = min(self.signal_delay_s, 30 * self.timeout_min)
        return {
            "timeout_min": self.timeout_min,
            "max_num_timeout": self.max_num_timeout,
            "signal_delay_s": delay,
        }

    def depending(self, dependency: str) -> "SlurmOptions":
        """The same options with a further dependency, such as `afterok:7`, for all jobs."""
        earlier = [self.dependency] if self.dependency else []
        return replace(self, dependency=",".join([*earlier, dependency]))

    def after_each(self, array: str, tasks: int) -> "SlurmOptions":
        """The same options for an array each of whose `tasks` starts when that of another has completed.

        A task whose other one failed leaves the queue.
        """
        kind = "aftercorr" if tasks > 1 else "afterok"
        more = {"kill_on_invalid_dep": "yes", **(self.additional_parameters or {})}
        return replace(self.depending(f"{kind}:{array}"), additional_parameters=more)

    def parameters(self) -> dict[str, Any]:
        """The options under the names of sbatch."""
        shared = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in OURS}
        given = {name: value for name, value in shared.items() if value is not None}
        memory = {} if self.mem_gb is None else {"mem": f"{int(self.mem_gb * 1024)}MB"}
        tasks = {} if self.tasks == 1 else {"ntasks_per_node": self.tasks_per_node}
        # A preempted job, or one that loses its node, is requeued, whatever the site's default.
        return {**given, **tasks, **memory, "requeue": True, **(self.additional_parameters or {})}


def submit_array(
    name: str,
    jobs: int,
    options: SlurmOptions,
    folder: Path,
    code: Path,
    task: str,
    places: Sequence[str] = (),
) -> str:
    """Submit an array of `jobs` tasks that run the module `task` on the copy `code`; returns its id.

    `folder` gets the script, `ID_submission.sh`, and the logs. The environment is the user's without the
    variables that change SLURM's commands. A container has the directories in `places`. Where sbatch fails
    although SLURM may have taken the jobs, they are looked for by their unique `name`.

    Raises:
        ValueError: if SLURM refuses the jobs, or is not installed.
        ConnectionError: if it is not known whether SLURM took them.
    """
    require("sbatch")
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / f"{name}.sh"
    script.write_text(_script(name, jobs, options, folder, code, task, places))
    environment = {key: value for key, value in undisturbed().items() if key not in PLAIN}
    try:
        command = ("sbatch", "--parsable", str(script))
        ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
        refusal = ended.stderr if ended.returncode else ""
        printed = re.search(r"^(\d+)(;|$)", ended.stdout, re.MULTILINE)
        array = "" if ended.returncode or printed is None else printed[1]
    except subprocess.TimeoutExpired:
        array, refusal = "", f"sbatch: error: timeout of {TIMEOUT} s"
    if not array:
        lines = [line.removeprefix("sbatch: error: ") for line in refusal.splitlines() if line.strip()]
        array = _found(name, "; ".join(lines) or "sbatch failed")
    script.rename(folder / f"{array}_submission.sh")
    return array


def _found(name: str, reason: str) -> str:
    """The id of the array `name`, whose submission failed for a `reason`."""
    for pause in AGAIN_AFTER if UNCERTAIN.search(reason) else AGAIN_AFTER[:1]:
        time.sleep(pause)
        try:
            since = "now-2days"  # the clocks of this machine and of the accounting may differ
            if array := named([name], since).get(name):
                log.warning("sbatch failed (%s), but SLURM has the jobs", reason)
                return array
        except ConnectionError as error:
            reason = f"{reason}; {error}"
    if UNCERTAIN.search(reason):
        raise ConnectionError(f"it is not known whether SLURM took the jobs: {reason}")
    raise ValueError(f"SLURM refuses the jobs: {reason}")


def _script(
    name: str,
    jobs: int,
    options: SlurmOptions,
    folder: Path,
    code: Path,
    task: str,
    places: Sequence[str],
) -> str:
    """submitit's script, with a command of ours: its own unpickles a file that is written after sbatch."""
    from submitit.slurm.slurm import _make_sbatch_string

    shown = {key: _joined(value) for key, value in options.parameters().items() if value is not False}
    step, within, setup, teardown = list(options.srun_args or []), [], list(options.setup or []), None
    if options.container is not None:
        setup, teardown = [*setup, f"export {BY_SCRIPT}=1"], [REQUEUE]
        seen, own = [str(folder.parent), *places], options.container_args or []
        if options.container_runtime == "pyxis":
            mounts = ",".join(f"{place}:{place}" for place in dict.fromkeys(seen))
            step += [f"--container-image={options.container}", f"--container-mounts={mounts}", *own]
        else:
            binds = [f"--bind={place}" for place in dict.fromkeys(seen)]
            within = [options.container_runtime, "exec", *binds, *own, options.container]
    python = sys.executable if options.container is None else "python3"
    command = [*python_of(code, "USR2 TERM", within, python), "-u", "-m", task, str(folder.parent), name]
    if options.cpus_per_task is not None:
        step.append(f"--cpus-per-task={options.cpus_per_task}")  # since 22.05 a step does not inherit it
    if options.tasks > 1:  # a task that ends does not end the first one, which says so
        step += ["--kill-on-bad-exit=0", "--wait=0"]
    return _make_sbatch_string(
        shlex.join(command),
        _in_pattern(folder),
        job_name=name,
        time=options.timeout_min,
        signal_delay_s=options.limits()["signal_delay_s"],
        map_count=jobs if jobs > 1 else None,
        array_parallelism=options.array_parallelism,
        setup=setup or None,
        teardown=teardown,
        stderr_to_stdout=options.stderr_to_stdout,
        srun_args=step,
        wckey=None,  # pyright: ignore[reportArgumentType]
        additional_parameters=shown,
    )


def largest_array() -> int:
    """The largest number of jobs in an array here: one less than MaxArraySize."""
    limit = re.search(r"MaxArraySize\s*=\s*(\d+)", output_of("scontrol", "show", "config"))
    return max(1, int(limit[1]) - 1) if limit else 1000


def _in_pattern(folder: Path) -> str:
    """A folder in SLURM's pattern, in which a percent sign begins a field."""
    return str(folder).replace("%", "%%")


def log_path(folder: Path, id: str) -> Path:
    """The log file of a job."""
    return folder / f"{id}_0_log.out"


def ignored_variables() -> list[str]:
    """The user's variables that would be options of sbatch, and are not used."""
    return sorted(name for name in os.environ if name.startswith("SBATCH_"))


def ids_of(array: str, tasks: Sequence[Sequence[int]]) -> dict[int, str]:
    """The id of every job of an array, by number; `tasks` are the jobs of each task."""
    alone = len(tasks) == 1
    return {job: array if alone else f"{array}_{index}" for index, task in enumerate(tasks) for job in task}
