"""The command `python -m runners.tracking sync OUTPUTS`: publish runs that an outage or a kill cut off."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from runners.tracking.sync import sync


def main(arguments: Sequence[str]) -> int:
    """`sync OUTPUTS [--tracking-uri URI]`: a line per run; 1 if any could not be published."""
    parser = argparse.ArgumentParser(prog="python -m runners.tracking", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("sync", help="publish what an outage or a kill left unpublished")
    command.add_argument("outputs", type=Path)
    command.add_argument("--tracking-uri", help="instead of the one that each run was given")
    chosen = parser.parse_args(arguments)
    try:
        outcomes = sync(chosen.outputs, chosen.tracking_uri)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    for run in outcomes:
        sys.stdout.write(f"{run.status:<9} {run.name}  {run.directory}: {run.outcome}\n")
    failed = sum(run.failed for run in outcomes)
    sys.stdout.write(f"{len(outcomes)} runs, {failed} could not be published\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
