"""The command `weightgeom sync OUTPUTS`: publish runs after an outage or a kill."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from runners.errors import replace_unprintable
from runners.tracking.sync import sync


def main(arguments: Sequence[str]) -> int:
    """`sync [OUTPUTS] [--tracking-uri URI]`: prints a line per run; returns 1 if a run failed to publish."""
    parser = argparse.ArgumentParser(prog="weightgeom", description="Publish runs after an outage or a kill.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("sync", help="publish everything that an outage or a kill left unpublished")
    command.add_argument("outputs", type=Path, nargs="?", default=Path("outputs"), help="default: outputs")
    command.add_argument("--tracking-uri", help="replaces the tracking URI of every run")
    chosen = parser.parse_args(arguments)
    replace_unprintable()
    try:
        outcomes = sync(chosen.outputs, chosen.tracking_uri)
    except (ValueError, FileNotFoundError) as error:
        command.error(str(error))
    for run in outcomes:
        sys.stdout.write(f"{run.status:<9} {run.name}  {run.directory}: {run.outcome}\n")
    failed = sum(run.failed for run in outcomes)
    sys.stdout.write(f"{len(outcomes)} runs, {failed} could not be published\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
