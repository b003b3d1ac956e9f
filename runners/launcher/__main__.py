"""The command `python -m runners.launcher status|wait|cancel|resubmit SWEEP_DIR`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from runners.errors import complaint
from runners.launcher.commands import cancel, resubmit, speak, status, watch
from runners.launcher.manifest import Sweep


def main(arguments: Sequence[str]) -> int:
    """`status|wait|cancel|resubmit SWEEP_DIR`; 0 if all is well, 1 if a job failed or was cancelled."""
    parser = argparse.ArgumentParser(prog="python -m runners.launcher", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    said = {
        "status": "how the jobs stand; 1 if one failed or was cancelled",
        "wait": "show how they stand until all have ended; 1 if one failed or was cancelled",
        "cancel": "end the jobs that run, and take the others off the queue",
        "resubmit": "start again what failed, was cancelled or never ran, and return",
    }
    for name, help in said.items():
        command = commands.add_parser(name, help=help)
        command.add_argument("sweep", type=Path, metavar="SWEEP_DIR")
        if name == "wait":
            command.add_argument("--poll", type=float, default=2.0, help="seconds between two looks (2)")
        if name == "cancel":
            command.add_argument("jobs", type=int, nargs="*", metavar="NUMBER", help="only these jobs")
        if name == "resubmit":
            command.add_argument("--new-code", action="store_true", help="run the code as it is now")
    chosen = parser.parse_args(arguments)
    speak()
    try:
        sweep = Sweep.find(chosen.sweep)
        if chosen.command == "status":
            status(sweep)
        elif chosen.command == "wait":
            watch(sweep, chosen.poll)
        elif chosen.command == "cancel":
            cancel(sweep, chosen.jobs)
        else:
            resubmit(sweep, chosen.new_code)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {complaint(error)}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
