"""One task of an array under SLURM: `python -m runners.launcher.task SWEEP_DIR SUBMISSION`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from runners.launcher.jobs import Job
from runners.launcher.manifest import Sweep


def main(arguments: Sequence[str]) -> None:
    """Run the jobs of this task, unless a later submission has them or this one was withdrawn.

    SLURM may have taken jobs without the launcher hearing of it; of two submissions of a job the last counts.
    """
    sweep, name = Sweep(Path(arguments[0])), arguments[1]
    submissions = sweep.manifest()["submissions"]
    place = next(place for place, known in enumerate(submissions) if known.get("name") == name)
    directories = sweep.jobs()
    for number in submissions[place]["tasks"][int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))]:
        later = any(number in task for more in submissions[place + 1 :] for task in more["tasks"])
        if later or submissions[place].get("withdrawn"):
            print(f"job {number} does not start: it was {'submitted again' if later else 'cancelled'} since")
        else:
            Job(str(directories[number]), slurm=True)()


if __name__ == "__main__":
    main(sys.argv[1:])
