"""Hydra in, objects out: `weightgeom run`; `-m` runs a sweep, `--help` lists the choices."""

import gc
import logging
import os
import re
import sys
import traceback
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from runners.cli.choices import reference
from runners.cli.compare import quoted
from runners.compose import check, check_hydra, checked, described, experiment, plan, trusted_targets
from runners.disk import share_with_group
from runners.errors import CONF, explanation, replace_unprintable
from runners.launcher.hydra_launcher import register
from runners.signals import share_processors
from runners.tracking.redaction import redacted_text
from weightgeom.text.files import ADDRESS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


VERBOSE = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
HELP = {"--help", "-h"}
MULTIRUN = {"--multirun", "-m"}
USAGE = """\
usage: weightgeom run [GROUP=CHOICE ...] [KEY=VALUE ...] [-m]

One run; with -m a sweep over all combinations of values: seed=0,1,2 objective=ce,dpo.

  -m, --multirun      start a sweep
  --cfg job           print the composed configuration and stop; --resolve replaces its interpolations
  --config-dir DIR    further choices, of your own: DIR/probe/mine.yaml is probe=[mine]
  --info searchpath   print where choices are searched for
  --hydra-help        all flags of Hydra

"""
EARLIER = re.compile(r"^(\+{0,2})objective\.on=")  # the earlier name of objective.train_on
# A value that Hydra takes as this very text; others may be a list, a mapping, or several values.
PLAIN = re.compile(r"[\w/\-+.$%*@?|:]*", re.ASCII)
PLANNED = re.compile(r"\+{0,2}plan=(?i:true|on|yes|1)")


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def job(config: DictConfig) -> None:
    """One run, or its plan; a failed run keeps its traceback next to its record. Sweeps have launchers."""
    from hydra.core.hydra_config import HydraConfig

    try:
        if config.plan:
            checked(config)
            return plan([(config, HydraConfig.get().runtime.choices["objective"])])
        run = described(config)
        made = experiment(run)
        gc.freeze()  # the libraries, through which every collection of garbage would go again
        made.run()
        if run["config"]["report"]:
            from runners.report.make import make

            page = make([run["config"]["name"]], run["config"]["tracking_uri"], Path(run["outputs"]))
            print(f"report: {page}")
    except Exception as error:
        with suppress(OSError):  # on a full disk the first error is the one to report
            text = redacted_text(traceback.format_exc())
            Path(HydraConfig.get().runtime.output_dir, "traceback.txt").write_text(text)
        exit_with_sentence(error)  # here, because Hydra would print a line of its own first
        raise


class Sharing(Callback):
    """Sets the umask for a directory that a group shares, before Hydra makes anything in it."""

    def on_run_start(self, config: DictConfig, **_: object) -> None:
        """Of a run."""
        share_with_group(Path(config.outputs).expanduser().absolute())

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        """Of a sweep."""
        share_with_group(Path(config.outputs).expanduser().absolute())


def check_settings_of_hydra() -> None:
    """Let Hydra compose no foreign code into settings of its own; replaces a method of its config loader.

    Hydra instantiates its callbacks before any other code can look at them.
    """
    load = ConfigLoaderImpl.load_configuration
    if load.__module__ == __name__:
        return

    def load_checked(*arguments: Any, **named: Any) -> DictConfig:
        config = load(*arguments, **named)
        plain: Any = OmegaConf.to_container(config, resolve=False)
        outputs = plain.get("outputs", "outputs")  # looked at before Hydra makes it as a directory
        if not isinstance(outputs, str) or not outputs.strip():
            raise ValueError(f"outputs must be text that is not empty, got {outputs!r}")
        if ADDRESS.match(outputs):
            raise ValueError(f"outputs={outputs} is an address: set outputs= to a directory of this machine")
        check_hydra(plain.get("hydra", {}), "hydra", sorted(trusted_targets()))
        return config

    ConfigLoaderImpl.load_configuration = load_checked


register(check, plan)
check_settings_of_hydra()


def exit_with_sentence(error: Exception) -> None:
    """Print `error` as one sentence and exit with code 1; with HYDRA_FULL_ERROR=1 return, to let it raise."""
    if not VERBOSE:
        print(f"error: {redacted_text(explanation(error))}", file=sys.stderr)
        if isinstance(error, BrokenPipeError):  # or else flushing the rest at exit fails again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


@contextmanager
def temporary_output_directory() -> "Iterator[None]":
    """Within it, Hydra makes the directories of runs and sweeps in a temporary directory."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as directory:
        place = next(index for index, argument in enumerate(sys.argv) if PLANNED.fullmatch(argument))
        # Next to plan=true, because Hydra refuses overrides that a flag separates from the others.
        sys.argv[place:place] = [f"hydra.run.dir={directory}/run", f"hydra.sweep.dir={directory}/sweep"]
        yield


def _whole_path(argument: str) -> str:
    """`key='a{1}.txt'` for `key=a{1}.txt` if there is such a file or directory."""
    key, _, value = argument.partition("=")
    there = bool(value) and not PLAIN.fullmatch(value) and "${" not in value
    return f"{key}={quoted(value)}" if there and os.path.exists(os.path.expanduser(value)) else argument


def main(arguments: "Sequence[str]") -> None:
    """Run Hydra on overrides and flags, set as this process's arguments.

    Any error is printed as one sentence, and the exit code is not zero.
    """
    named = [_whole_path(EARLIER.sub(r"\1objective.train_on=", argument)) for argument in arguments]
    sys.argv[1:] = sorted(named, key=MULTIRUN.__contains__)  # last: Hydra refuses overrides behind a flag
    share_processors()
    replace_unprintable()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them
    logging.raiseExceptions = VERBOSE  # a full disk is reported once, not again for every log line
    try:
        if HELP.intersection(arguments):
            print(USAGE + reference(arguments))
            return
        with temporary_output_directory() if any(map(PLANNED.fullmatch, sys.argv)) else nullcontext():
            job()
    except Exception as error:
        exit_with_sentence(error)
        raise
    except KeyboardInterrupt:
        if VERBOSE:
            raise
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
