"""Uses of Hydra's private parts by the launchers; those of other libraries are in `weightgeom.compat`.

They are apart because the library must not import Hydra. Tested with Hydra 1.3.
"""

from collections.abc import Callable
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.types import Override, ValueType
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

NAMESPACE = "hydra_plugins.weightgeom"  # Hydra accepts launchers from hydra_plugins only


def add_launcher(name: str, launcher: Callable[..., Launcher]) -> None:
    """Register a launcher as NAMESPACE.name in `Plugins.class_name_to_class`; mutates this table of Hydra's.

    `Plugins.register` would register it under its own module, outside the namespace that Hydra accepts; and
    Hydra imports every package in that namespace at every start.
    """
    table: dict[str, Any] = Plugins.instance().class_name_to_class  # of classes, which Hydra only calls
    table[f"{NAMESPACE}.{name}"] = launcher


def compose_once(loader: Any) -> None:
    """Make a config loader compose each job of a sweep once: replaces its `load_sweep_config`.

    Hydra's sweeper composes every job as a check and drops the result, which takes half of a start's time.
    """
    compose, composed = loader.load_sweep_config, {}

    def composed_once(master_config: Any, sweep_overrides: list[str]) -> Any:
        key = tuple(sweep_overrides)
        if key in composed:
            return composed.pop(key)
        composed[key] = compose(master_config, sweep_overrides)
        return composed[key]

    loader.load_sweep_config = composed_once


def commas_in_launcher_options() -> None:
    """Take the commas of `hydra.launcher.exclude=n1,n2` as text; replaces a method of Hydra's config loader.

    Hydra takes them for a sweep over its own options, which it refuses.
    """
    refuse = ConfigLoaderImpl.validate_sweep_overrides_legal
    if refuse.__module__ == __name__:
        return

    def validate(overrides: list[Override], run_mode: Any, from_shell: bool) -> None:
        for override in overrides:
            if override.is_sweep_override() and override.key_or_group.startswith("hydra.launcher."):
                assert override.input_line is not None
                override._value = override.input_line.partition("=")[2]
                override.value_type = ValueType.ELEMENT
        refuse(overrides, run_mode, from_shell)

    ConfigLoaderImpl.validate_sweep_overrides_legal = staticmethod(validate)


def completed(overrides: list[str], value: Any = None) -> JobReturn:
    """The result of a completed job; JobReturn's constructor takes the value only as `_return_value`."""
    return JobReturn(overrides, status=JobStatus.COMPLETED, _return_value=value)
