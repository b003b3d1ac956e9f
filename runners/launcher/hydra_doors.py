"""Private parts of Hydra 1.3 that the launchers need; those of other libraries are in `weightgeom.compat`.

Two places, because the library must not import Hydra.
"""

from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

NAMESPACE = "hydra_plugins.weightgeom"  # Hydra takes launchers from there only


def add_launcher(name: str, launcher: type[Launcher]) -> None:
    """Make a launcher known as NAMESPACE.name: `Plugins.class_name_to_class`; mutates Hydra's table.

    `Plugins.register` would file it under its own module, outside the namespace that Hydra allows, and a
    package of that namespace is scanned, with all it imports, at every start.
    """
    Plugins.instance().class_name_to_class[f"{NAMESPACE}.{name}"] = launcher


def compose_once(loader: Any) -> None:
    """Let a config loader compose the jobs of a sweep once: replaces its `load_sweep_config`.

    Hydra's sweeper composes every job to see whether it can be, and drops the result: half of a start's time.
    """
    compose, composed = loader.load_sweep_config, {}

    def composed_once(master_config: Any, sweep_overrides: list[str]) -> Any:
        key = tuple(sweep_overrides)
        if key in composed:
            return composed.pop(key)
        composed[key] = compose(master_config, sweep_overrides)
        return composed[key]

    loader.load_sweep_config = composed_once


def completed(overrides: list[str], value: Any = None) -> JobReturn:
    """The return of a completed job: `JobReturn._return_value`, whose public setter is of a made one only."""
    return JobReturn(overrides, status=JobStatus.COMPLETED, _return_value=value)
