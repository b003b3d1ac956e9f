"""The live table of a sweep's jobs in a terminal; elsewhere, one line per change of a job's state."""

import sys
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from runners.launcher.status import JobStatus, counts

MAX_ROWS = 20
STATE_COLOURS = {"RUNNING": "cyan", "COMPLETED": "green", "PENDING": "dim", "SUSPENDED": "yellow"}
STATE_ORDER = ("SUSPENDED", "RUNNING", "CONFIGURING", "PENDING", "COMPLETED")


class LiveTable:
    """Shows the statuses of the jobs and updates them; use it as a context manager."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stdout)
        self.live = Live(console=self.console, auto_refresh=False, transient=False)
        self.before: dict[int, str] = {}  # the state of each job at the last update

    def __enter__(self) -> "LiveTable":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def update(self, statuses: Sequence[JobStatus], trouble: str) -> None:
        """Show the current statuses, with `trouble` as a line below."""
        if self.console.is_terminal:
            self.live.update(self._table(statuses, trouble), refresh=True)
            return
        for job in statuses:
            if self.before.get(job.number) != job.state:
                node = f" on {job.node}" if job.node else ""
                why = f" ({job.waiting})" if job.waiting else ""
                line = f"#{job.number} {job.id} {job.state}{node}{why}"
                self.console.print(line, soft_wrap=True, markup=False, highlight=False)
        self.before = {job.number: job.state for job in statuses}

    def print(self, statuses: Sequence[JobStatus]) -> None:
        """Print the table once, with all jobs."""
        self.console.print(self._table(statuses, "", len(statuses)))

    def _table(self, statuses: Sequence[JobStatus], trouble: str, max_rows: int = MAX_ROWS) -> Group:
        table = Table("#", "job", "state", "node", "attempt", "progress", "run")
        for job in sorted(statuses, key=_rank)[:max_rows]:
            state = Text(job.state, STATE_COLOURS.get(job.state, "red"))
            attempt = str(job.attempt) if job.attempt else ""
            latest = Text(job.progress or job.waiting)
            table.add_row(str(job.number), job.id, state, job.node, attempt, latest, Text(job.name))
        hidden = len(statuses) - max_rows
        lines = [counts(statuses), f"{hidden} more are not shown" if hidden > 0 else "", trouble]
        return Group(table, *(Text(line) for line in lines if line))


def _rank(job: JobStatus) -> tuple[int, int]:
    """Failed jobs come first, then running, pending and completed ones."""
    return STATE_ORDER.index(job.state) + 1 if job.state in STATE_ORDER else 0, job.number
