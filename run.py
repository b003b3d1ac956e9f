"""Hydra in, objects out: `python run.py`, with `-m` for a sweep, with `--help` for the choices."""

import logging
import os
import re
import sys
import traceback
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from runners.compose import check, checked, described, experiment, plan
from runners.errors import complaint
from runners.launcher.hydra_launcher import register
from runners.signals import share_processors

if TYPE_CHECKING:
    from collections.abc import Iterator


VERBOSE = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
PLANNED = re.compile(r"\+{0,2}plan=(?i:true|on|yes|1)")


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def job(config: DictConfig) -> None:
    """One run; its traceback, if it fails, goes beside its record. Those of a sweep are launched instead."""
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    try:
        if config.plan:
            checked(config)
            return plan([(config, HydraConfig.get().runtime.choices["objective"])])
        run = described(config)
        experiment(run).run()
        if run["config"]["report"]:
            from runners.report.make import make

            page = make([run["config"]["name"]], run["config"]["tracking_uri"], Path(run["outputs"]))
            print(f"report: {page}")
    except Exception as error:
        with suppress(OSError):  # the disk may be full: that is then the error to tell
            Path(HydraConfig.get().runtime.output_dir, "traceback.txt").write_text(traceback.format_exc())
        end(error)  # Hydra would put a line of its own before it
        raise


register(check, plan)


def end(error: Exception) -> None:
    """Tell in one sentence what went wrong, and exit with 1; with HYDRA_FULL_ERROR=1 return to raise it."""
    if not VERBOSE:
        print(f"error: {complaint(error)}", file=sys.stderr)
        sys.exit(1)


@contextmanager
def nothing_left() -> "Iterator[None]":
    """Within it, Hydra makes the directory of a run or a sweep where it does not stay."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as directory:
        place = next(index for index, one in enumerate(sys.argv) if PLANNED.fullmatch(one))
        # Beside it: overrides that do not stand together are refused.
        sys.argv[place:place] = [f"hydra.run.dir={directory}/run", f"hydra.sweep.dir={directory}/sweep"]
        yield


def main() -> None:
    """Run Hydra; whatever goes wrong is told in one sentence, with a non-zero exit."""
    share_processors()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them itself
    logging.raiseExceptions = VERBOSE  # a log line that a full disk does not take is no news of its own
    try:
        with nothing_left() if any(map(PLANNED.fullmatch, sys.argv)) else nullcontext():
            job()
    except Exception as error:
        end(error)
        raise
    except KeyboardInterrupt:
        if VERBOSE:
            raise
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
