"""Each test fails with the name of a private part that a new version of Hydra has moved."""

from functools import partial
from types import SimpleNamespace

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode

from runners.launcher.hydra_doors import (
    NAMESPACE,
    add_launcher,
    commas_in_launcher_options,
    completed,
    compose_once,
)
from runners.launcher.hydra_launcher import SweepLauncher

MOVED = "hydra moved {}: change runners/launcher/hydra_doors.py"


def test_hydra_finds_a_launcher_in_its_table():
    table = getattr(Plugins.instance(), "class_name_to_class", None)
    assert isinstance(table, dict), MOVED.format("Plugins.class_name_to_class")
    add_launcher("Another", partial(SweepLauncher, "local", lambda *_: {}, lambda *_: None))
    try:
        config = {"_target_": f"{NAMESPACE}.Another", "poll_s": 1.0}
        made = Plugins.instance()._instantiate(config)  # pyright: ignore[reportArgumentType]
        assert isinstance(made, SweepLauncher), MOVED.format("Plugins.class_name_to_class")
    finally:
        del table[f"{NAMESPACE}.Another"]


def test_a_job_is_composed_once_for_sweeper_and_launcher():
    assert hasattr(ConfigLoader, "load_sweep_config"), MOVED.format("ConfigLoader.load_sweep_config")
    composed = []
    loader = SimpleNamespace(
        load_sweep_config=lambda config, overrides: composed.append(overrides) or object()
    )
    compose_once(loader)
    first = loader.load_sweep_config(None, ["seed=1"])
    assert loader.load_sweep_config(None, ["seed=1"]) is first
    assert loader.load_sweep_config(None, ["seed=2"]) is not first
    assert composed == [["seed=1"], ["seed=2"]]


def test_a_completed_job_gives_its_value():
    assert completed(["seed=1"], "place").return_value == "place", MOVED.format("JobReturn._return_value")


def test_commas_in_an_option_of_the_launcher_are_text_and_not_a_sweep():
    commas_in_launcher_options()
    given = ["hydra.launcher.exclude=n1,n2", "seed=0,1"]
    overrides = OverridesParser.create().parse_overrides(given)
    ConfigLoaderImpl.validate_sweep_overrides_legal(overrides, RunMode.MULTIRUN, from_shell=True)
    assert overrides[0].value() == "n1,n2", MOVED.format("Override")
    assert overrides[1].is_sweep_override()
    other = OverridesParser.create().parse_overrides(["hydra.job.name=a,b"])
    with pytest.raises(HydraException):
        ConfigLoaderImpl.validate_sweep_overrides_legal(other, RunMode.MULTIRUN, from_shell=True)
