"""Starts sweeps, here or under SLURM: the Hydra launchers behind `-m`, and `python -m runners.launcher`."""

import gc
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from runners.errors import complaint
from runners.launcher.hydra_doors import add_launcher, completed, compose_once

Plan = Callable[[Sequence[tuple[DictConfig, str]], int, float | None], None]
Check = Callable[[DictConfig, bool, Collection[str]], dict[str, Any]]


class SweepLauncher(Launcher):
    """Starts the jobs of a sweep in processes of their own, and watches them unless it is told not to.

    Every job's configuration is composed and checked before the first one starts; one that fails does not
    stop the others.
    """

    check: Check
    plan: Plan
    kind = "local"

    def __init__(self, **options: Any) -> None:  # the keys of conf/hydra/launcher/*.yaml
        plain = OmegaConf.to_container(OmegaConf.create(options), resolve=True)
        assert isinstance(plain, dict)
        self.options = plain
        self.config: DictConfig | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra has composed so far."""
        self.config, self.loader = config, hydra_context.config_loader
        gc.disable()  # until all is composed, which makes many small objects that stay: a sixth of the time
        compose_once(self.loader)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Start the jobs, and watch them to their end; raises if any failed."""
        assert self.config is not None
        setup_globals()
        planned = {
            override.lower() for one in job_overrides for override in one if override.startswith("plan=")
        }
        if len(planned) > 1:
            raise ValueError("plan is of the whole sweep: give plan=true, or plan=false, alone")
        if self.config.plan is True:
            return self._plan(job_overrides)
        from runners.launcher import commands

        commands.speak()
        directory = Path(str(self.config.hydra.sweep.dir)).resolve()
        fresh = not (directory / "sweep.json").exists()
        # Hydra's own note of the sweep would keep its secrets; each record has its configuration without.
        (directory / "multirun.yaml").unlink(missing_ok=True)
        common = frozenset.intersection(*map(frozenset, job_overrides))
        try:
            numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
            jobs = {
                number: self._job(number, list(overrides), common)
                for number, overrides in zip(numbers, job_overrides, strict=True)
            }
            gc.enable()
            swept = list(self.config.hydra.overrides.task)
            options = {str(key): one for key, one in self.options.items() if key not in ("detach", "poll_s")}
            sweep = commands.launch(directory, self.kind, options, jobs, swept)
        except BaseException:
            if fresh:
                commands.discard(directory)
            raise
        if not self.options["detach"]:
            commands.watch(sweep, self.options["poll_s"])
        return [completed(job["overrides"], job["directory"]) for job in jobs.values()]

    def _plan(self, job_overrides: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
        """Tell what the jobs would come to, and start none."""
        assert self.config is not None
        jobs = [self.loader.load_sweep_config(self.config, list(overrides)) for overrides in job_overrides]
        gc.enable()
        objectives = [job.hydra.runtime.choices["objective"] for job in jobs]
        for job in jobs:
            with open_dict(job):
                del job["hydra"]
        from runners.launcher import commands

        options = {str(key): one for key, one in self.options.items() if key not in ("detach", "poll_s")}
        room = commands.room(self.kind, options, len(jobs))
        type(self).plan(list(zip(jobs, objectives, strict=True)), *room)
        return [completed(list(overrides)) for overrides in job_overrides]

    def _job(self, number: int, overrides: list[str], common: Collection[str]) -> dict[str, Any]:
        """What job `number` is to do, checked; `common` are the overrides that all jobs have."""
        assert self.config is not None
        job = self.loader.load_sweep_config(self.config, overrides)
        with open_dict(job):
            job.hydra.job.id = job.hydra.job.num = number
        HydraConfig.instance().set_config(job)
        place = Path(str(job.hydra.sweep.dir), str(job.hydra.sweep.subdir)).resolve()
        copied: Any = HydraConfig.get().runtime
        for runtime in (job.hydra.runtime, copied):  # to copy all of it again is slow
            with read_write(runtime), open_dict(runtime):
                runtime.output_dir = str(place)
        logging, environment = (
            OmegaConf.to_container(part, resolve=True)
            for part in (job.hydra.job_logging, job.hydra.job.env_set)
        )
        with open_dict(job):
            del job["hydra"]
        try:
            described = type(self).check(job, self.kind == "local", common)
        except Exception as error:
            said = f"job {number} of the sweep ({' '.join(filter_overrides(overrides))}): {complaint(error)}"
            raise ValueError(f"{said}; nothing was started") from error
        return {
            **described,
            "overrides": filter_overrides(overrides),
            "cwd": os.getcwd(),
            "logging": logging,
            "environment": environment,
        }


class SlurmLauncher(SweepLauncher):
    """The same, as arrays under SLURM."""

    kind = "slurm"


def register(check: Check, plan: Plan) -> None:
    """Make the launchers known to Hydra.

    `check` describes a job, or refuses what cannot work; `plan` tells what jobs come to, so many at a time,
    of which each has so many bytes of memory elsewhere, or None here.
    """
    SweepLauncher.check = staticmethod(check)
    SweepLauncher.plan = staticmethod(plan)
    add_launcher("LocalLauncher", SweepLauncher)
    add_launcher("SlurmLauncher", SlurmLauncher)
