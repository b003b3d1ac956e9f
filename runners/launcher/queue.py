"""Questions to SLURM: the states of jobs in its queue and its accounting, whatever the user's environment."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

TIMEOUT = 60  # seconds for a command of SLURM's
# Variables that change the answers of SLURM's commands, and those of the allocation that this process is in.
DISTURBING = re.compile(r"(SALLOC|SACCT|SBATCH|SCANCEL|SCONTROL|SINFO|SLURM|SLURMD|SQUEUE|SRUN|SSTAT)_")
KEPT = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_SACK_KEY", "SLURM_SACK_JWKS"}
PLAIN = {"SLURM_TIME_FORMAT": "%s", "SLURM_BITSTR_LEN": "0"}  # times in seconds since 1970, all indices
SHOWN = {
    "COMPLETING": "RUNNING",
    "SIGNALING": "RUNNING",
    "STAGE_OUT": "RUNNING",
    "STOPPED": "SUSPENDED",
    **dict.fromkeys(("RUNNING", "SUSPENDED", "CONFIGURING"), ""),
}  # other states in the queue are PENDING

# Reasons for which a pending job never starts unless somebody changes it, with what to do.
STUCK = {
    "PartitionTimeLimit": "timeout_min is beyond the partition's limit",
    "PartitionNodeLimit": "the partition does not give a job this many nodes",
    "PartitionConfig": "the partition has no node for these resources",
    "BadConstraints": "no node has these features and resources",
    "AccountNotAllowed": "the partition refuses this account",
    "QOSNotAllowed": "the account may not use this qos",
    "InvalidAccount": "SLURM does not know this account",
    "InvalidQOS": "SLURM does not know this qos",
    "PartitionInactive": "the partition takes no jobs",
    "JobHeldUser": "it is held: release it with `scontrol release {id}`",
    "JobHeldAdmin": "an administrator holds it",
    "DependencyNeverSatisfied": "a job that it depends on has failed",
    "ReservationDeleted": "its reservation is gone",
    "held state": "it is held: release it with `scontrol release {id}`",
    "requeued held": "SLURM has held it after a failed start: release it with `scontrol release {id}`",
    "PerJob": "the resources are beyond a limit of the account or the qos for one job",
    "MinCpuNotSatisfied": "the qos asks for more processors",
    "MinGRES": "the qos asks for more GPUs",
    "MinMemory": "the qos asks for more memory",
}


class ReportedState(NamedTuple):
    """A job's state as reported by SLURM, or by the supervisor here; the empty state is unknown."""

    state: str
    node: str = ""
    reason: str = ""
    starts: float | None = None  # the estimate of SLURM, in seconds since 1970
    submitted: float | None = None  # in seconds since 1970


def queued(ids: Sequence[str]) -> dict[str, ReportedState]:
    """The states of the jobs that are in the queue: PENDING, CONFIGURING, RUNNING or SUSPENDED.

    Raises:
        ConnectionError: if SLURM does not answer.
    """
    if not ids:
        return {}
    arrays = ",".join(dict.fromkeys(id.split("_")[0] for id in ids))
    states = {}
    try:
        output = output_of("squeue", "-h", "-r", "-a", "-o", "%i|%T|%N|%S|%V|%r", "-j", arrays)
    except ConnectionError as error:
        if "Invalid job id specified" not in str(error):
            raise
        output = ""  # squeue fails with this when asked for a single job that has left the queue
    for line in output.splitlines():
        id, state, node, starts, submitted, reason = line.split("|", 5)
        shown = (SHOWN[state] or state) if state in SHOWN else "PENDING"
        states[id] = ReportedState(shown, node, reason, _time(starts), _time(submitted))
    return {id: states[id] for id in ids if id in states}


def accounted(ids: Sequence[str]) -> dict[str, ReportedState]:
    """The states of the jobs in the accounting, or on a site without it, in the controller's memory."""
    arrays = list(dict.fromkeys(id.split("_")[0] for id in ids))
    if not arrays:
        return {}
    try:
        output = output_of("sacct", "-n", "-P", "-X", "-o", "JobID,State,NodeList", "-j", ",".join(arrays))
        rows = [line.split("|", 2) for line in output.splitlines()]
    except (ConnectionError, ValueError):
        rows = _from_controller(arrays)
    return _states(ids, rows)


def controlled(ids: Sequence[str]) -> dict[str, ReportedState]:
    """The states of the jobs in the controller's memory, which forgets a job some minutes after its end."""
    return _states(ids, _from_controller(dict.fromkeys(id.split("_")[0] for id in ids)))


def named(names: Sequence[str], since: str) -> dict[str, str]:
    """The ids of arrays and single jobs by their names, from the queue and the accounting since a date.

    Raises:
        ConnectionError: if SLURM does not answer.
    """
    rows = output_of("squeue", "-h", "-a", "-o", "%F|%j", "--name", ",".join(names)).splitlines()
    with suppress(ConnectionError, ValueError):  # on a site without accounting
        asked = ("sacct", "-n", "-P", "-X", "-o", "JobID,JobName", "-S", since, "--name", ",".join(names))
        rows += output_of(*asked).splitlines()
    fields = (row.partition("|") for row in rows)
    return {name: id.partition("_")[0] for id, _, name in fields if name in names}


class Allocation(NamedTuple):
    """One start of a job by the accounting: its seconds, and the peak memory of its largest step in bytes."""

    id: str
    state: str
    seconds: int
    memory: float


def allocations(ids: Sequence[str]) -> list[Allocation] | None:
    """All starts of the jobs, those of one job in order.

    None on a site without accounting, and for no jobs, for which sacct would take all of the user's.
    """
    if not ids:
        return None
    arrays = ",".join(dict.fromkeys(id.split("_")[0] for id in ids))
    try:
        output = output_of("sacct", "-n", "-P", "-D", "-o", "JobID,State,ElapsedRaw,MaxRSS", "-j", arrays)
    except (ConnectionError, ValueError):
        return None
    started: list[Allocation] = []
    for id, state, seconds, memory in (line.split("|") for line in output.splitlines()):
        if "." not in id:
            started.append(Allocation(id, state.split(" ")[0], int(seconds or 0), _bytes(memory)))
        elif started:  # its steps follow an allocation
            started[-1] = started[-1]._replace(memory=max(started[-1].memory, _bytes(memory)))
    return started


def scancel(ids: Sequence[str]) -> None:
    """End running jobs and remove pending ones from the queue.

    Raises:
        ConnectionError: if SLURM does not answer.
    """
    for start in range(0, len(ids), 500):
        output_of("scancel", *ids[start : start + 500])


def stuck(reported_reason: str, id: str) -> str:
    """Why a job with this reason never starts, and the remedy; empty if it may start."""
    for reason, meaning in STUCK.items():
        if reason in reported_reason:
            return f"{reported_reason}: {meaning.format(id=id)}"
    return ""


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


def require(command: str) -> None:
    """Raise ValueError unless this machine has a command of SLURM's."""
    if shutil.which(command) is None:
        raise ValueError(
            f"there is no SLURM here ({command} is not on PATH): log in to the cluster,"
            " or run the sweep on this machine with hydra/launcher=local"
        )


def undisturbed() -> dict[str, str]:
    """This process's environment without the variables that change SLURM's commands."""
    kept = {name: value for name, value in os.environ.items() if name in KEPT or not DISTURBING.match(name)}
    return kept | PLAIN


def output_of(*command: str) -> str:
    """The standard output of a SLURM command; raises ConnectionError if it fails."""
    require(command[0])
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=undisturbed())
    except subprocess.TimeoutExpired as error:
        raise ConnectionError(f"SLURM does not answer: {command[0]} took more than {TIMEOUT} s") from error
    if ended.returncode:
        reason = " ".join(ended.stderr.split()) or f"exit code {ended.returncode}"
        raise ConnectionError(f"SLURM does not answer: {command[0]} says: {reason}")
    return ended.stdout


def _states(ids: Sequence[str], rows: Iterable[Sequence[str]]) -> dict[str, ReportedState]:
    states = {}
    for name, state, node in rows:
        for id in expanded(name):
            plain_state = state.split(" ")[0].rstrip("+")
            states[id] = ReportedState(plain_state, "" if node.startswith("None") else node)
    return {id: states[id] for id in ids if id in states}


def _from_controller(arrays: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    for array in arrays:
        try:
            output = output_of("scontrol", "-o", "show", "job", array)
        except ConnectionError:  # scontrol fails for jobs that the controller has forgotten
            continue
        for line in output.splitlines():
            values: Mapping[str, str] = dict(re.findall(r"(\w+)=(\S*)", line))
            index = values.get("ArrayTaskId", "")
            id = array if not index else f"{array}_{index}" if index.isdecimal() else f"{array}_[{index}]"
            yield id, values.get("JobState", ""), values.get("NodeList", "").replace("(null)", "")


def _bytes(size: str) -> float:
    """A size as sacct prints it, such as 812K; 0 for none."""
    powers = {"K": 10, "M": 20, "G": 30, "T": 40}
    return float(size.rstrip("KMGT") or 0) * 2.0 ** powers.get(size[-1:], 0)


def _time(seconds: str) -> float | None:
    """A time as SLURM prints it with `PLAIN`; None for N/A."""
    return float(seconds) if seconds.isdecimal() else None
