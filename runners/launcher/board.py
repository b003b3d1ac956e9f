"""The live table of a sweep's jobs in a terminal; elsewhere a line whenever a job's state changes."""

import sys
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from runners.launcher.status import Row, counts

SHOWN = 20  # rows, at most
COLOURS = {"RUNNING": "cyan", "COMPLETED": "green", "PENDING": "dim"}
ORDER = ("RUNNING", "PENDING", "COMPLETED")


class Board:
    """Shows how the jobs stand, over and over; use it as a context."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stdout)
        self.live = Live(console=self.console, auto_refresh=False, transient=False)
        self.before: dict[int, str] = {}

    def __enter__(self) -> "Board":
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

    def show(self, rows: Sequence[Row], trouble: str) -> None:
        """Bring it up to date."""
        if self.console.is_terminal:
            self.live.update(self._table(rows, trouble), refresh=True)
            return
        for row in rows:
            if self.before.get(row.number) != row.state:
                where = f" on {row.node}" if row.node else ""
                self.console.print(f"#{row.number} {row.id} {row.state}{where}", soft_wrap=True, markup=False)
        self.before = {row.number: row.state for row in rows}

    def print(self, rows: Sequence[Row]) -> None:
        """Show it once, all of it."""
        self.console.print(self._table(rows, "", len(rows)))

    def _table(self, rows: Sequence[Row], trouble: str, most: int = SHOWN) -> Group:
        table = Table("#", "job", "state", "node", "attempt", "progress", "run")
        for row in sorted(rows, key=_rank)[:most]:
            state = Text(row.state, COLOURS.get(row.state, "red"))
            attempt = str(row.attempt) if row.attempt else ""
            table.add_row(
                str(row.number), row.id, state, row.node, attempt, Text(row.progress), Text(row.name)
            )
        hidden = len(rows) - most
        lines = [counts(rows), f"{hidden} more are not shown" if hidden > 0 else "", trouble]
        return Group(table, *(Text(line) for line in lines if line))


def _rank(row: Row) -> tuple[int, int]:
    """Failed jobs first, then those that run, wait and are done."""
    return ORDER.index(row.state) + 1 if row.state in ORDER else 0, row.number
