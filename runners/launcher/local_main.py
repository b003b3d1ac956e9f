"""The supervisor process of a local sweep: `python -m runners.launcher.local_main PLAN`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from runners.launcher.local import Supervisor, lock_of
from runners.launcher.manifest import Sweep
from runners.launcher.ownership import held


def main(arguments: Sequence[str]) -> None:
    """`python -m runners.launcher.local_main PLAN`: run the jobs of the plan, then end the sweep."""
    plan = Path(arguments[0])
    sweep = Sweep(plan.parent)
    with held(lock_of(plan)):
        Supervisor(sweep, json.loads(plan.read_text()))()
    from runners.launcher.finishing import end_sweep
    from runners.launcher.status import settled_statuses

    with sweep.lock():
        end_sweep(sweep, settled_statuses(sweep))


if __name__ == "__main__":
    main(sys.argv[1:])
