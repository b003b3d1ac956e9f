"""The Hydra launcher behind `-m`: one parent record for the sweep, one child for each of its jobs."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, open_dict

from runners.complaints import complaint

log = logging.getLogger(__name__)
PLUGIN = "hydra_plugins.weightgeom.LocalLauncher"  # Hydra takes launchers from this namespace only
Check = Callable[[DictConfig], object]


class LocalLauncher(BasicLauncher):
    """Runs the jobs of a sweep here, one after the other; a job that fails does not stop the others.

    Every job's configuration is composed and checked before the first one starts.
    """

    check: Check
    common: frozenset[str] = frozenset()  # the overrides that all jobs of the sweep have

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and return how each ended; the parent is FINISHED if all of them are."""
        assert self.config is not None and self.hydra_context is not None
        type(self).common = frozenset.intersection(*map(frozenset, job_overrides))
        loader = self.hydra_context.config_loader
        for index, overrides in enumerate(job_overrides):
            job = loader.load_sweep_config(self.config, list(overrides))
            with open_dict(job):
                del job["hydra"]  # its job.id and job.num are not known before the job starts
            try:
                type(self).check(job)
            except Exception as error:
                said = f"job {index} of the sweep ({' '.join(overrides)}): {complaint(error)}"
                raise ValueError(f"{said}; nothing was started") from error
        from runners.experiment import sweep_record  # noqa: PLC0415 (heavy, and not needed for --help)
        from runners.sweep import summarise  # noqa: PLC0415

        config = self.config
        directory = Path(str(config.hydra.sweep.dir)).resolve() / "record"
        # Hydra's own note of the sweep would keep its secrets; each record has its configuration without.
        directory.with_name("multirun.yaml").unlink(missing_ok=True)
        swept = list(config.hydra.overrides.task)
        with sweep_record(
            directory,
            name=config.name,
            tracking_uri=config.tracking_uri,
            overrides=swept,
            common=type(self).common,
        ) as record:
            returns = super().launch(job_overrides, initial_job_idx)
            numbers = range(initial_job_idx, initial_job_idx + len(returns))
            summarise(record, [directory.parent / str(number) / "record" for number in numbers])
            failed = [job for job in returns if job.status == JobStatus.FAILED]
            for job in failed:
                log.error("failed: %s: %s", " ".join(job.overrides or ()), complaint(job._return_value))
            if failed:
                raise ChildProcessError(
                    f"{len(failed)} of {len(returns)} jobs of the sweep in {directory.parent} failed:"
                    " the log above says why, and each has its traceback.txt there"
                )
        return returns


def register(check: Check) -> None:
    """Make the launcher known to Hydra; `check` refuses a job's configuration that cannot work."""
    LocalLauncher.check = staticmethod(check)
    Plugins.instance().class_name_to_class[PLUGIN] = LocalLauncher
