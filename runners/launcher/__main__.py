"""The command `weightgeom sweep status|wait|cancel|resubmit SWEEP_DIR`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runners.errors import explanation, replace_unprintable
from runners.launcher.commands import cancel, log_to_stdout, resubmit, status, watch
from runners.launcher.manifest import Sweep


def main(arguments: Sequence[str]) -> int:
    """`status|wait|cancel|resubmit SWEEP_DIR`; returns 1 if a job failed or was cancelled, else 0."""
    parser = argparse.ArgumentParser(prog="weightgeom sweep", description="Commands on a sweep.")
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "status": "print the status of every job; exit code 1 if a job failed or was cancelled",
        "wait": "show the live table until all jobs have ended; exit code as status",
        "cancel": "end running jobs and remove pending ones from the queue",
        "resubmit": "restart jobs that failed, were cancelled or never ran; returns at once",
    }
    for name, help in helps.items():
        command = commands.add_parser(name, help=help)
        command.add_argument("sweep", type=Path, metavar="SWEEP_DIR")
        if name == "wait":
            command.add_argument("--poll", type=seconds, default=2.0, help="seconds between two polls (2)")
        if name == "cancel":
            command.add_argument("jobs", type=int, nargs="*", metavar="NUMBER", help="only these jobs")
        if name == "resubmit":
            command.add_argument("--new-code", action="store_true", help="run the current code")
            command.epilog = "other options are the launcher's, such as --mem_gb 64 --timeout_min 600"
    chosen, more = parser.parse_known_args(arguments)
    if more and chosen.command != "resubmit":
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    replace_unprintable()
    log_to_stdout()
    try:
        sweep = Sweep.find(chosen.sweep)
        if chosen.command == "status":
            status(sweep)
        elif chosen.command == "wait":
            watch(sweep, chosen.poll)
        elif chosen.command == "cancel":
            cancel(sweep, chosen.jobs)
        else:
            resubmit(sweep, chosen.new_code, launcher_options(more))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {explanation(error)}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def launcher_options(arguments: Sequence[str]) -> dict[str, Any]:
    """`--mem_gb 64 --exclude=n1,n2` as options of a launcher, with values in YAML.

    Raises:
        ValueError: if an option has no value.
    """
    import yaml

    options, left = {}, list(arguments)
    while left:
        name, has_value, value = left.pop(0).partition("=")
        if not name.startswith("--") or not (has_value or left):
            raise ValueError(f"expected an option of the launcher, such as --timeout_min 600, got {name!r}")
        value = value if has_value else left.pop(0)
        try:
            options[name[2:].replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"cannot read the value of {name}, {value!r}: put a text in quotes") from error
    return options


def seconds(text: str) -> float:
    """A time in seconds, for argparse."""
    if not 0 < (time := float(text)) < float("inf"):
        raise ValueError(f"{text} is no time")
    return time


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
