"""Jobs under SLURM: submission as arrays through submitit, and their states in queue and accounting."""

import logging
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from runners.launcher.jobs import Job
from runners.launcher.snapshot import python_of

log = logging.getLogger(__name__)
TIMEOUT = 60  # seconds for a command of SLURM's
# Options that submitit does not have, or has under another name.
OURS = {"timeout_min", "mem_gb", "tasks_per_node", "name", "max_num_timeout", "additional_parameters"}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SlurmOptions:
    """Resources and limits of the jobs, named as in hydra-submitit-launcher; None leaves them to the site."""

    timeout_min: int = Field(default=60, ge=1)
    max_num_timeout: int = Field(default=3, ge=0)  # restarts of a job that reaches its time limit
    signal_delay_s: int = Field(default=120, ge=1)  # between the signal to save and the end
    array_parallelism: int = Field(default=256, ge=1)  # jobs at a time
    name: str = "weightgeom"
    cpus_per_task: int | None = None
    gpus_per_node: int | str | None = None
    mem_gb: float | None = None
    nodes: int = 1
    tasks_per_node: int = 1
    partition: str | None = None
    qos: str | None = None
    account: str | None = None
    constraint: str | None = None
    gres: str | None = None
    exclude: str | None = None
    nodelist: str | None = None
    exclusive: bool | str | None = None
    dependency: str | None = None
    comment: str | None = None
    cpus_per_gpu: int | None = None
    gpus_per_task: int | str | None = None
    mem_per_gpu: str | None = None
    mem_per_cpu: str | None = None
    mail_type: str | None = None
    mail_user: str | None = None
    setup: list[str] | None = None  # shell lines before the job
    srun_args: list[str] | None = None
    stderr_to_stdout: bool = True  # one log per job
    additional_parameters: dict[str, Any] | None = None  # further options of sbatch

    def __post_init__(self) -> None:
        """Refuse more than one process for a run."""
        if self.nodes * self.tasks_per_node != 1:
            raise ValueError(
                "a run is one process: hydra.launcher.nodes and tasks_per_node must be 1, got"
                f" {self.nodes} and {self.tasks_per_node}"
            )

    def limits(self) -> dict[str, Any]:
        """The time limits of a job; its signal to save comes after half of `timeout_min` at the earliest."""
        delay = min(self.signal_delay_s, 30 * self.timeout_min)
        return {
            "timeout_min": self.timeout_min,
            "max_num_timeout": self.max_num_timeout,
            "signal_delay_s": delay,
        }

    def parameters(self) -> dict[str, Any]:
        """The options under the names of submitit's SlurmExecutor."""
        shared = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in OURS}
        given = {name: value for name, value in shared.items() if value is not None}
        memory = {} if self.mem_gb is None else {"mem": f"{int(self.mem_gb * 1024)}MB"}
        # A preempted job, or one that loses its node, is requeued, whatever the site's default.
        more = {"requeue": True, **(self.additional_parameters or {})}
        own = {"job_name": self.name, "time": self.timeout_min, "additional_parameters": more}
        own["signal_delay_s"] = self.limits()["signal_delay_s"]
        return {**given, **memory, **own}


class ReportedState(NamedTuple):
    """A job's state as reported by SLURM, or by the supervisor here; the empty state is unknown."""

    state: str
    node: str = ""
    reason: str = ""


def submit_arrays(
    jobs: Mapping[int, Job], options: SlurmOptions, folder: Path, code: Path
) -> Iterator[dict[int, str]]:
    """Submit the jobs as arrays of the largest size that the site allows; yields each array's ids by number.

    Raises:
        ValueError: if SLURM refuses the jobs, or is not installed.
    """
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    _require("sbatch")
    folder.mkdir(parents=True, exist_ok=True)
    numbers, size = list(jobs), largest_array()
    arrays: list[str] = []
    for start in range(0, len(numbers), size):
        chunk = numbers[start : start + size]
        executor = SlurmExecutor(str(folder), python=shlex.join(python_of(code)))
        parameters = options.parameters()
        if arrays:  # in parallel, the arrays together would exceed array_parallelism
            given = [options.dependency] if options.dependency else []
            parameters["dependency"] = ",".join([*given, f"afterany:{arrays[-1]}"])
        executor.update_parameters(**parameters)
        try:
            submitted = executor.submit_array([jobs[number] for number in chunk])
        except FailedJobError as error:
            reason = "; ".join(
                line.removeprefix("sbatch: error: ") for line in str(error).splitlines() if line.strip()
            )
            raise ValueError(f"SLURM refuses the jobs: {reason or 'sbatch failed'}") from error
        ids = {number: job.job_id for number, job in zip(chunk, submitted, strict=True)}
        arrays.append(submitted[0].job_id.split("_")[0])
        yield ids


def largest_array() -> int:
    """The largest number of jobs in an array here: one less than MaxArraySize."""
    limit = re.search(r"MaxArraySize\s*=\s*(\d+)", _output("scontrol", "show", "config"))
    return max(1, int(limit[1]) - 1) if limit else 1000


def log_path(folder: Path, id: str) -> Path:
    """The log file of a job."""
    return folder / f"{id}_0_log.out"


def queued(ids: Sequence[str]) -> dict[str, ReportedState]:
    """The states of the jobs that are in the queue.

    Raises:
        ConnectionError: if SLURM does not answer.
    """
    if not ids:
        return {}
    arrays = ",".join(dict.fromkeys(id.split("_")[0] for id in ids))
    states = {}
    try:
        output = _output("squeue", "-h", "-r", "-o", "%i|%T|%N|%r", "-j", arrays)
    except ConnectionError as error:
        if "Invalid job id specified" not in str(error):
            raise
        output = ""  # squeue fails with this when asked for a single job that has left the queue
    for line in output.splitlines():
        id, state, node, reason = line.split("|", 3)
        states[id] = ReportedState(state, node, reason)
    return {id: states[id] for id in ids if id in states}


def accounted(ids: Sequence[str]) -> dict[str, ReportedState]:
    """The states of the jobs in the accounting, or on a site without it, in the controller's memory."""
    arrays = list(dict.fromkeys(id.split("_")[0] for id in ids))
    if not arrays:
        return {}
    try:
        output = _output("sacct", "-n", "-P", "-X", "-o", "JobID,State,NodeList", "-j", ",".join(arrays))
        rows = [line.split("|", 2) for line in output.splitlines()]
    except (ConnectionError, ValueError):
        rows = _from_controller(arrays)
    states = {}
    for name, state, node in rows:
        for id in expanded(name):
            plain_state = state.split(" ")[0].rstrip("+")
            states[id] = ReportedState(plain_state, "" if node.startswith("None") else node)
    return {id: states[id] for id in ids if id in states}


def scancel(ids: Sequence[str]) -> None:
    """End running jobs and remove pending ones from the queue.

    Raises:
        ConnectionError: if SLURM does not answer.
    """
    for start in range(0, len(ids), 500):
        _output("scancel", *ids[start : start + 500])


def expanded(name: str) -> list[str]:
    """The ids in SLURM's short form of an array: `7_[0-2,5%2]` stands for 7_0, 7_1, 7_2 and 7_5."""
    match = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", name)
    if match is None:
        return [name]
    ids = []
    for part in match[2].split(","):
        first, _, last = part.partition("-")
        ids += [f"{match[1]}_{index}" for index in range(int(first), int(last or first) + 1)]
    return ids


def _from_controller(arrays: Sequence[str]) -> list[tuple[str, str, str]]:
    rows = []
    for array in arrays:
        try:
            output = _output("scontrol", "-o", "show", "job", array)
        except ConnectionError:  # scontrol fails for jobs that the controller has forgotten
            continue
        for line in output.splitlines():
            values = dict(re.findall(r"(\w+)=(\S*)", line))
            index = values.get("ArrayTaskId", "")
            id = array if not index else f"{array}_{index}" if index.isdecimal() else f"{array}_[{index}]"
            rows.append((id, values.get("JobState", ""), values.get("NodeList", "").replace("(null)", "")))
    return rows


def _require(command: str) -> None:
    if shutil.which(command) is None:
        raise ValueError(
            f"there is no SLURM here ({command} is not on PATH): log in to the cluster,"
            " or run the sweep on this machine with hydra/launcher=local"
        )


def _output(*command: str) -> str:
    """The standard output of a SLURM command; raises ConnectionError if it fails."""
    _require(command[0])
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise ConnectionError(f"SLURM does not answer: {command[0]} took more than {TIMEOUT} s") from error
    if ended.returncode:
        reason = " ".join(ended.stderr.split()) or f"exit code {ended.returncode}"
        raise ConnectionError(f"SLURM does not answer: {command[0]} says: {reason}")
    return ended.stdout
