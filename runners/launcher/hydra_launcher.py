"""Hydra launchers behind `-m`: they start sweeps on this machine or under SLURM."""

import gc
import os
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from runners.errors import explanation
from runners.launcher.hydra_doors import add_launcher, commas_in_launcher_options, completed, compose_once

PlanJobs = Callable[[Sequence[tuple[DictConfig, str]], int, float | None, int], None]
CheckJob = Callable[[DictConfig, bool, Collection[str]], dict[str, Any]]


class SweepLauncher(Launcher):
    """Starts the jobs of a sweep in processes of their own, and shows them until they end, unless `detach`.

    Every job's configuration is composed and checked before the first job starts; a job that fails does not
    stop the others. `kind` is local or slurm; `options` are the keys of conf/hydra/launcher/*.yaml.
    """

    def __init__(self, kind: str, check: CheckJob, plan: PlanJobs, /, **options: Any) -> None:
        self.kind, self.check, self.plan = kind, check, plan
        plain = OmegaConf.to_container(OmegaConf.create(options), resolve=True)
        assert isinstance(plain, dict)
        self.options = plain
        self.config: DictConfig | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the sweep's configuration and the loader of the jobs' configurations."""
        self.config, self.loader = config, hydra_context.config_loader
        gc.disable()  # while composing, which makes many small, lasting objects: saves a sixth of the time
        compose_once(self.loader)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Start the jobs and show them until they end; raises ChildProcessError if any failed."""
        assert self.config is not None
        setup_globals()
        planned = {
            override.lower()
            for overrides in job_overrides
            for override in overrides
            if override.startswith("plan=")
        }
        if len(planned) > 1:
            raise ValueError("plan applies to the whole sweep: give plan=true or plan=false, not both")
        if self.config.plan is True:
            return self._plan(job_overrides)
        from runners.launcher import commands

        commands.log_to_stdout()
        directory = Path(str(self.config.hydra.sweep.dir)).resolve()
        # Hydra's multirun.yaml may hold secrets; each run's record has its configuration with secrets masked.
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
            options = self._job_options()
            sweep = commands.launch(directory, self.kind, options, jobs, swept)
        except BaseException:
            commands.remove_unlaunched(directory)
            raise
        if not self.options["detach"]:
            commands.watch(sweep, self.options["poll_s"])
        return [completed(job["overrides"], job["directory"]) for job in jobs.values()]

    def _job_options(self) -> dict[str, Any]:
        own = ("detach", "poll_s")  # of the launcher itself
        return {str(key): value for key, value in self.options.items() if key not in own}

    def _plan(self, job_overrides: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
        """Print the plan of the jobs without starting any."""
        assert self.config is not None
        jobs = [self._composed(list(overrides)) for overrides in job_overrides]
        gc.enable()
        objectives = [job.hydra.runtime.choices["objective"] for job in jobs]
        HydraConfig.instance().set_config(jobs[0])  # has the search path
        for job in jobs:
            with open_dict(job):
                del job["hydra"]
        from runners.launcher import commands

        resources = commands.resources(self.kind, self._job_options(), len(jobs))
        self.plan(list(zip(jobs, objectives, strict=True)), *resources)
        return [completed(list(overrides)) for overrides in job_overrides]

    def _composed(self, overrides: list[str]) -> DictConfig:
        """The configuration of a job, whose training has a process in each of the job's tasks."""
        assert self.config is not None
        from runners.launcher import commands

        job = self.loader.load_sweep_config(self.config, overrides)
        tasks = commands.tasks(self.kind, self._job_options())
        if OmegaConf.select(job, "objective._target_") and OmegaConf.select(job, "training.processes") == 1:
            OmegaConf.update(job, "training.processes", tasks)
        return job

    def _job(self, number: int, overrides: list[str], common: Collection[str]) -> dict[str, Any]:
        """The checked description of job `number`; `common` are the overrides that all jobs share."""
        job = self._composed(overrides)
        with open_dict(job):
            job.hydra.job.id = job.hydra.job.num = number
        HydraConfig.instance().set_config(job)
        place = Path(str(job.hydra.sweep.dir), str(job.hydra.sweep.subdir)).resolve()
        copied: Any = HydraConfig.get().runtime
        for runtime in (job.hydra.runtime, copied):  # a second copy of the whole configuration would be slow
            with read_write(runtime), open_dict(runtime):
                runtime.output_dir = str(place)
        logging, environment = (
            OmegaConf.to_container(part, resolve=True)
            for part in (job.hydra.job_logging, job.hydra.job.env_set)
        )
        with open_dict(job):
            del job["hydra"]
        try:
            described = self.check(job, self.kind == "local", common)
        except Exception as error:
            name = f"job {number} of the sweep ({' '.join(filter_overrides(overrides))})"
            raise ValueError(f"{name}: {explanation(error)}; nothing was started") from error
        return {
            **described,
            "overrides": filter_overrides(overrides),
            "cwd": os.getcwd(),
            "logging": logging,
            "environment": environment,
        }


def register(check: CheckJob, plan: PlanJobs) -> None:
    """Register the launchers with Hydra.

    `check` describes a job or raises; `plan` prints the plan of jobs, given the number that run at a time,
    the bytes of memory of each, None for this machine, and the nodes of each.
    """
    add_launcher("LocalLauncher", partial(SweepLauncher, "local", check, plan))
    add_launcher("SlurmLauncher", partial(SweepLauncher, "slurm", check, plan))
    commas_in_launcher_options()
