"""Nodes whose clocks differ by an hour."""

import json
import shutil
from pathlib import Path

import pytest
from cluster import Cluster, base
from sweeps import events, states, steps, until

LIBRARIES = [*Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")]
# For the job alone: SLURM's own messages would be refused, and files have the clock of their file system.
PROLOG = """#!/bin/sh
[ "$SLURMD_NODENAME" = n1 ] || exit 0
for variable in LD_PRELOAD={library} FAKETIME=+1h NO_FAKE_STAT=1 DONT_FAKE_MONOTONIC=1
do echo "export $variable"; done
"""
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)


@pytest.mark.skipif(not LIBRARIES, reason="faketime is not installed: apt-get install faketime")
def test_a_run_that_goes_on_at_a_node_an_hour_behind_has_its_steps_and_its_duration(
    cluster: Cluster, outputs: Path, tmp_path: Path
):
    shutil.copytree(outputs, tmp_path / "outputs")
    place = cluster.at(tmp_path)
    prolog = tmp_path / "prolog"
    prolog.write_text(PROLOG.format(library=LIBRARIES[0]))
    prolog.chmod(0o755)
    options = [f'hydra.launcher.srun_args=["--task-prolog={prolog}"]', "hydra.launcher.timeout_min=30"]
    nodes = ["hydra.launcher.exclude=n3,n4", "hydra.launcher.exclusive=true"]
    own = ["name=clocks", "training.steps=100", "training.save_every=5", "seed=1,2"]
    sweep = place.started("hydra/launcher=slurm", *options, *nodes, *own)
    until(lambda: all(max(steps(sweep, number), default=0) > 5 for number in (0, 1)))
    began = {number: events(sweep, number)[0] for number in (0, 1)}
    (ahead,) = [number for number in began if began[number]["node"] == "n1"]
    assert 3000 < began[ahead]["time"] - began[1 - ahead]["time"] < 4200
    assert place.command("status", sweep).code == 0
    cluster.ask("scontrol", "update", "nodename=n1", "state=drain", "reason=test")
    cluster.ask("scancel", "-s", "USR2", f"{base(sweep)}_{ahead}")
    try:
        waited = place.command("wait", sweep, "--poll", "0.3")
    finally:
        cluster.ask("scontrol", "update", "nodename=n1", "state=resume")
    assert waited.code == 0, waited.out + waited.err
    assert states(sweep, ahead) == ["RUNNING", "INTERRUPTED", "RUNNING", "COMPLETED"]
    assert events(sweep, ahead)[-1]["node"] == "n2" and events(sweep, ahead)[1]["timeouts"] == 0
    for number in (0, 1):
        assert steps(sweep, number) == list(range(1, 101))
        description, status = (
            json.loads((sweep / f"{number}/record/{name}.json").read_text()) for name in ("run", "status")
        )
        assert 0 < status["end_time"] - description["start_time"] < 3_000_000
    _, children = place.runs("clocks")
    for run in children.values():
        assert run.info.end_time is not None and run.info.start_time is not None
        assert 0 < run.info.end_time - run.info.start_time < 3_000_000
