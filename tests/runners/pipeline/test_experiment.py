"""An experiment whose training and measurements are two jobs."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from configs import composed
from networks import save

from runners.compose import checked, parts
from runners.pipeline.experiment import Experiment
from weightgeom.trajectory import Base


class Reached(Exception):
    """A stage, with the device of its specification."""


def make(prefix: str, code: str, of: str = ""):
    def stage(name: str, specification: Mapping[str, object], work: object, steps: int) -> Path:
        raise Reached(f"{name} on {specification['device']}")

    return stage


def test_a_training_by_an_earlier_job_is_found_whatever_the_device_of_this_one(tmp_path):
    given = parts(checked(composed("device=cpu", "+data.documents=40", "+data.pairs=8")))
    places = {"outputs": tmp_path, "directory": tmp_path}
    run = Experiment(**given, **places, run_name="dpo", params={}, config="")
    later = replace(run, trained_on="cuda")
    examples = run.data.examples()
    base = Base(save("gpt_neox", tmp_path / "base"), "base")
    assert run.objective is not None
    for experiment, device in ((run, "cpu"), (later, "cuda")):
        with pytest.raises(Reached, match=f"pretraining on {device}"):
            experiment.prepared(make, examples)
        with pytest.raises(Reached, match=f"training on {device}"):
            experiment.trained(make, base, run.objective, examples)
        assert experiment.device == "cpu"  # of the probes
