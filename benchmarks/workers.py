"""Time of a chain of revisions measured by one worker, over that by two, and whether their tables are equal.

    python benchmarks/workers.py DIRECTORY [REVISIONS] [WIDTH]

Each is a run of its own with one thread a process, after one that compiles. The probe is `rsf`, whole, with
intervals.
Exits with 1 if tables differ. The machine should be idle and have two cores.
"""

import os
import resource
import sys
import time
from pathlib import Path

from commands import RUN, ended, newest, tables
from walk_kills import make


def main(directory: Path, revisions: int, width: int) -> int:
    """Print wall and processor times, and the ratio; the exit code."""
    directory.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    places = make(directory, revisions, width)
    stages = "{" + ",".join(f"{name}: {place}" for name, place in places.items()) + "}"
    settings = ["model=chain/own", f"model.stages={stages}", "objective=none", "probe=[rsf]", "device=cpu"]
    command = [*RUN, *settings, "report=false", "name=workers"]
    ended(directory / "warm", [*command, "plan=true"])
    wall, results = {}, {}
    for workers in (1, 2):
        home = directory / f"workers-{workers}"
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        code, out = ended(home, [*command, f"probe.workers={workers}"])
        assert code == 0, out
        wall[workers] = time.monotonic() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        results[workers] = tables(newest(home))
        print(f"workers={workers}: {wall[workers]:.1f} s, {busy:.1f} s of processor time", flush=True)
    same = results[1] == results[2]
    print(
        f"two take {wall[2] / wall[1]:.2f} times as long as one, and {'the same' if same else 'OTHER'} tables"
    )
    return int(not same)


if __name__ == "__main__":
    more = [int(number) for number in sys.argv[2:4]]
    sys.exit(main(Path(sys.argv[1]).resolve(), *(more + [16, 256][len(more) :])))
