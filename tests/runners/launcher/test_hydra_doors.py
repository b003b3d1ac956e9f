"""Each test fails with the name of a private part that a new version of Hydra has moved."""

from types import SimpleNamespace

from hydra.core.config_loader import ConfigLoader
from hydra.core.plugins import Plugins

from runners.launcher.hydra_doors import NAMESPACE, add_launcher, completed, compose_once
from runners.launcher.hydra_launcher import SweepLauncher

MOVED = "hydra moved {}: change runners/launcher/hydra_doors.py"


def test_hydra_finds_a_launcher_in_its_table():
    table = getattr(Plugins.instance(), "class_name_to_class", None)
    assert isinstance(table, dict), MOVED.format("Plugins.class_name_to_class")
    add_launcher("Another", SweepLauncher)
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
