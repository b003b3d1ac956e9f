"""Configurations as people write them: keys of the site, earlier names, settings without a choice."""

import logging
from pathlib import Path
from typing import Any

import pytest
from configs import CONF
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from runners.compose import checked, chosen, parts, renamed
from runners.errors import explanation
from weightgeom.objectives.dpo import DPO


def composed(*overrides: str) -> dict[str, Any]:
    """The configuration that `python run.py` composes from overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        HydraConfig.instance().set_config(compose("config", list(overrides), return_hydra_config=True))
        return checked(compose("config", list(overrides)))


@pytest.mark.parametrize("header", ["", "# @package _global_\n"])
def test_settings_of_a_site_are_those_of_the_run(tmp_path: Path, header: str) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local/default.yaml").write_text(f"{header}device: cpu\ntraining:\n  batch_size: 3\n")
    config = composed(f"hydra.searchpath=[file://{tmp_path}]")
    assert config["device"] == "cpu"
    assert config["training"]["batch_size"] == 3
    assert "local" not in config


def test_an_unknown_top_level_key_of_a_site_is_refused(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local/default.yaml").write_text("devise: cpu\n")
    with pytest.raises(KeyError, match="there is no top-level key devise; did you mean 'device'"):
        composed(f"hydra.searchpath=[file://{tmp_path}]")


@pytest.mark.parametrize("key", ["only", "tags"])
def test_a_mapping_is_given_without_a_plus_sign(key: str) -> None:
    assert composed(f"{key}={{rank1: [dpo]}}")[key] == {"rank1": ["dpo"]}
    assert composed(f"+{key}.rank1=[dpo]")[key] == {"rank1": ["dpo"]}
    assert composed()[key] == {}


def test_an_experiments_settings_of_a_probe_that_is_not_selected_are_not_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        config = composed("experiment=trajectory", "probe=[behaviour]")
    assert list(chosen(config, "probe")) == ["behaviour"]
    assert "probe.rsf is not selected, so its settings (increments) are not used" in caplog.text


def test_settings_of_an_unknown_probe_are_refused() -> None:
    with pytest.raises(ValueError, match=r"probe\.rsff must be one of the choices in conf/probe"):
        parts(composed("+probe.rsff.k=3"))


@pytest.mark.parametrize("key", ["on", "true", '"on"'])
def test_the_earlier_name_of_train_on_is_understood_in_a_file(key: str) -> None:
    written = f"_target_: weightgeom.objectives.ce.CE\ntrain_on: auto\n{key}: chosen\n"
    objective: Any = OmegaConf.to_container(OmegaConf.create(written))
    assert renamed(objective) == {"_target_": "weightgeom.objectives.ce.CE", "train_on": "chosen"}


def test_an_objective_of_ones_own_may_have_a_key_on() -> None:
    own = {"_target_": "mylab.Own", "on": "chosen"}
    assert renamed(own) == own


def test_a_plus_sign_before_a_key_that_exists_is_explained() -> None:
    with pytest.raises(Exception) as raised:
        composed("+model.allow_bin=true", "model=pair")
    assert explanation(raised.value) == (
        "the key model.allow_bin exists already: leave out the plus sign, model.allow_bin=..."
    )


OWN = ("model=chain/own", "model.stages={base: a, sft: b, 10: c}", "objective=none")


@pytest.mark.parametrize("name", ["sft", "10"])
def test_a_key_that_is_a_word_of_python_is_a_field_with_an_underscore(name: str) -> None:
    config = composed(*OWN, f"model.from={name}")
    assert str(config["model"]["from"]) == name  # which is how the record has it
    assert parts(config)["model"].from_ == name
    assert parts(composed(*OWN))["model"].from_ is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.from=rlvr", r"model: unknown stage model\.from=rlvr; choose from base, sft, 10"),
        ("model.from=[sft]", r"model\.from should be a valid string, got \['sft'\]"),
        ("+model.fro=sft", r"there is no key model\.fro; did you mean 'from'\?"),
    ],
)
def test_a_stage_to_start_from_that_cannot_be_is_refused_by_its_key(override: str, message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        parts(composed(*OWN, override))


def test_moments_take_an_objective_by_its_name() -> None:
    made = parts(composed("probe=[moments]", "+objective@probe.moments.objective=dpo", *OWN))
    probe = made["probes"]["moments"]
    assert isinstance(probe.objective, DPO) and made["objective"] is None
    assert probe.declaration.compares and not probe.declaration.needs_objective
    alone = parts(composed("probe=[moments]"))["probes"]["moments"]
    assert alone.declaration.needs_objective and not alone.declaration.compares
    with pytest.raises(ValueError, match=r"probe\.moments\.objective.* instance of Objective"):
        parts(composed("probe=[moments]", "probe.moments.objective=dpo"))
