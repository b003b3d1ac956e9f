"""Jobs under SLURM: arrays submitted through submitit, and what the queue and the accounting say of them."""

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
ANSWER = 60  # seconds that a command of SLURM's may take
OURS = {"timeout_min", "mem_gb", "tasks_per_node", "name", "max_num_timeout", "additional_parameters"}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SlurmOptions:
    """What the jobs ask SLURM for, under the names of hydra-submitit-launcher; None leaves it to the site."""

    timeout_min: int = Field(default=60, ge=1)
    max_num_timeout: int = Field(default=3, ge=0)  # how often a job that ran out of time goes on
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
    setup: list[str] | None = None  # lines of shell before the job
    srun_args: list[str] | None = None
    stderr_to_stdout: bool = True  # one log a job
    additional_parameters: dict[str, Any] | None = None  # whatever else sbatch takes

    def __post_init__(self) -> None:
        """Refuse several processes for one run."""
        if self.nodes * self.tasks_per_node != 1:
            raise ValueError(
                "a run is one process: hydra.launcher.nodes and tasks_per_node must be 1, got"
                f" {self.nodes} and {self.tasks_per_node}"
            )

    def limits(self) -> dict[str, Any]:
        """What a job has to know of its time; it is told to save after half of it at the earliest."""
        delay = min(self.signal_delay_s, 30 * self.timeout_min)
        return {
            "timeout_min": self.timeout_min,
            "max_num_timeout": self.max_num_timeout,
            "signal_delay_s": delay,
        }

    def parameters(self) -> dict[str, Any]:
        """As submitit's SlurmExecutor names them."""
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in OURS}
        given = {name: value for name, value in plain.items() if value is not None}
        memory = {} if self.mem_gb is None else {"mem": f"{int(self.mem_gb * 1024)}MB"}
        # A job that is preempted or loses its node is to be started again, whatever the site's default is.
        more = {"requeue": True, **(self.additional_parameters or {})}
        own = {"job_name": self.name, "time": self.timeout_min, "additional_parameters": more}
        own["signal_delay_s"] = self.limits()["signal_delay_s"]
        return {**given, **memory, **own}


class Seen(NamedTuple):
    """What SLURM says of a job; an empty state says that it knows nothing of it."""

    state: str
    node: str = ""
    reason: str = ""


def submit(
    jobs: Mapping[int, Job], options: SlurmOptions, folder: Path, code: Path
) -> Iterator[dict[int, str]]:
    """Submit the jobs as arrays of the size that the site allows; yields the ids of each by number.

    Raises:
        ValueError: if SLURM refuses them, or is not there.
    """
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    _find("sbatch")
    folder.mkdir(parents=True, exist_ok=True)
    numbers, size = list(jobs), largest_array()
    after: list[str] = []
    for start in range(0, len(numbers), size):
        some = numbers[start : start + size]
        executor = SlurmExecutor(str(folder), python=shlex.join(python_of(code)))
        parameters = options.parameters()
        if after:  # or both arrays together would exceed the parallelism
            given = [options.dependency] if options.dependency else []
            parameters["dependency"] = ",".join([*given, f"afterany:{after[-1]}"])
        executor.update_parameters(**parameters)
        try:
            submitted = executor.submit_array([jobs[number] for number in some])
        except FailedJobError as error:
            said = "; ".join(
                line.removeprefix("sbatch: error: ") for line in str(error).splitlines() if line.strip()
            )
            raise ValueError(f"SLURM refuses the jobs: {said or 'sbatch failed'}") from error
        ids = {number: one.job_id for number, one in zip(some, submitted, strict=True)}
        after.append(submitted[0].job_id.split("_")[0])
        yield ids


def largest_array() -> int:
    """How many jobs one array may have here: one less than MaxArraySize."""
    shown = re.search(r"MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config"))
    return max(1, int(shown[1]) - 1) if shown else 1000


def log_of(folder: Path, id: str) -> Path:
    """Where a job writes what it says."""
    return folder / f"{id}_0_log.out"


def queued(ids: Sequence[str]) -> dict[str, Seen]:
    """What the queue still has of the jobs.

    Raises:
        ConnectionError: if SLURM does not answer.
    """
    if not ids:
        return {}
    wanted = ",".join(dict.fromkeys(id.split("_")[0] for id in ids))
    found = {}
    try:
        shown = _ask("squeue", "-h", "-r", "-o", "%i|%T|%N|%r", "-j", wanted)
    except ConnectionError as error:
        if "Invalid job id specified" not in str(error):
            raise
        shown = ""  # its way of saying that it has forgotten the only job that it was asked for
    for line in shown.splitlines():
        id, state, node, reason = line.split("|", 3)
        found[id] = Seen(state, node, reason)
    return {id: found[id] for id in ids if id in found}


def accounted(ids: Sequence[str]) -> dict[str, Seen]:
    """What the accounting has of the jobs, or where there is none, the memory of the controller."""
    bases = list(dict.fromkeys(id.split("_")[0] for id in ids))
    if not bases:
        return {}
    try:
        shown = _ask("sacct", "-n", "-P", "-X", "-o", "JobID,State,NodeList", "-j", ",".join(bases))
        rows = [line.split("|", 2) for line in shown.splitlines()]
    except (ConnectionError, ValueError):
        rows = _remembered(bases)
    found = {}
    for name, state, node in rows:
        for id in expanded(name):
            found[id] = Seen(state.split(" ")[0].rstrip("+"), "" if node.startswith("None") else node)
    return {id: found[id] for id in ids if id in found}


def cancel(ids: Sequence[str]) -> None:
    """Take jobs off the queue and end those that run.

    Raises:
        ConnectionError: if SLURM does not answer.
    """
    for start in range(0, len(ids), 500):
        _ask("scancel", *ids[start : start + 500])


def expanded(name: str) -> list[str]:
    """The ids that SLURM writes as one: `7_[0-2,5%2]` is 7_0, 7_1, 7_2 and 7_5."""
    match = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", name)
    if match is None:
        return [name]
    ids = []
    for part in match[2].split(","):
        first, _, last = part.partition("-")
        ids += [f"{match[1]}_{index}" for index in range(int(first), int(last or first) + 1)]
    return ids


def _remembered(bases: Sequence[str]) -> list[tuple[str, str, str]]:
    rows = []
    for base in bases:
        try:
            shown = _ask("scontrol", "-o", "show", "job", base)
        except ConnectionError:  # what it has forgotten is an error to it
            continue
        for line in shown.splitlines():
            values = dict(re.findall(r"(\w+)=(\S*)", line))
            index = values.get("ArrayTaskId", "")
            id = base if not index else f"{base}_{index}" if index.isdecimal() else f"{base}_[{index}]"
            rows.append((id, values.get("JobState", ""), values.get("NodeList", "").replace("(null)", "")))
    return rows


def _find(command: str) -> None:
    if shutil.which(command) is None:
        raise ValueError(
            f"there is no SLURM here ({command} is not on PATH): log in to the cluster,"
            " or run the sweep on this machine with hydra/launcher=local"
        )


def _ask(*command: str) -> str:
    _find(command[0])
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER)
    except subprocess.TimeoutExpired as error:
        raise ConnectionError(f"SLURM does not answer: {command[0]} took more than {ANSWER} s") from error
    if answer.returncode:
        said = " ".join(answer.stderr.split()) or f"exit code {answer.returncode}"
        raise ConnectionError(f"SLURM does not answer: {command[0]} says: {said}")
    return answer.stdout
