import gc
import os
import signal
import sys
from collections.abc import Collection, Generator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

os.environ["OMP_NUM_THREADS"] = "1"  # in processes of their own as well: threads that wait keep a core busy
# Compiling the code, with its checks of shapes, takes half of the time of importing it.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
gc.disable()  # while the tests are collected: what is imported stays
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # behind a shell's `&`, and in all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Files that start processes, servers or a cluster, and mostly wait for them, then those that train or measure
# networks dozens of times. The longest come first, so that they wait while other workers compute.
SLOW = (
    "slurm/test_interruptions.py",
    "slurm/test_sweeps_under_slurm.py",
    "slurm/test_ranks.py",
    "slurm/test_arrays.py",
    "slurm/test_clocks.py",
    "test_run.py",
    "test_readme.py",
    "runners/launcher/test_local_sweeps.py",
    "test_tools.py",
    "runners/planning/test_plan.py",
    "test_own_code.py",
    "runners/cli/test_wheel.py",
    "test_extensions.py",
    "runners/tracking/test_outages.py",
    "bases/test_chain.py",
    "bases/test_remote.py",
    "training/test_processes.py",
    "training/test_resuming.py",
    "training/test_lora.py",
    "runners/tracking/test_browser.py",
    "runners/tracking/test_server.py",
    "runners/tracking/test_publisher.py",
    "runners/report/test_report.py",
    "test_bad_input.py",
    "test_library_and_pair.py",
    "bases/test_hub.py",
    "data/test_hub_data.py",
    "runners/launcher/test_jobs.py",
    "probes/test_moments_probe.py",
    "objectives/test_graded_contrastive.py",
    "interventions/test_surgery.py",
    "interventions/test_rank1.py",
    "objectives/test_dpo.py",
    "probes/test_rsf_evidence.py",
    "probes/test_uncertainty_probe.py",
    "runners/summary/test_terminal.py",
    "runners/summary/test_sweep.py",
    "figures/test_causal.py",
    "uncertainty/test_rows.py",
    "training/test_matching.py",
)
# Of tests on the network of every architecture, the quick ones take these alone: a fused and a grouped one,
# one with experts and one with linear attention.
QUICK_NETWORKS = {"gpt_neox", "llama", "mixtral", "qwen3_next"}


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, and torch, unless other processes run the tests, which start after this one."""
    if "PYTEST_XDIST_WORKER" in os.environ or not config.getoption("numprocesses"):
        config.pluginmanager.import_plugin("shared")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the files of `SLOW`, which come first, in their order, and further networks as slow."""
    tests = Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(SLOW)}
    networks = import_module("networks")
    others = (networks.CONFIGS | networks.MIXTURES).keys() - QUICK_NETWORKS
    for item in items:
        if item.path in places or on_network(item, others):
            item.add_marker("slow")
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    gc.freeze()  # the libraries are looked through no more
    gc.enable()


def on_network(item: pytest.Item, names: Collection[str]) -> bool:
    """Whether a test is parametrised by one of these networks."""
    callspec = getattr(item, "callspec", None)  # only parametrised tests have one
    given = () if callspec is None else callspec.params.values()
    return any(isinstance(value, str) and value in names for value in given)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """With CI=true, where all is installed, a test that skips because something is not has failed."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and "install" in report.longrepr[2]:
        report.outcome = "failed"
    return report


class Scheduling(LoadFileScheduling):
    """A file is one worker's; so is all that shares the SLURM, which is more than enough for one machine."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "tests/slurm" if file.startswith("tests/slurm/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Scheduling(config, log)
