import sys
from pathlib import Path
from typing import Any

import pytest
from configs import composed
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from runners import compose
from runners.compose import check_hydra, check_origin, check_targets, checked, parts


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's module `benchlab`, which marks a file when it is imported."""
    (tmp_path / "benchlab.py").write_text(
        "import subprocess\nfrom dataclasses import dataclass\nfrom pathlib import Path\n"
        f"Path({str(tmp_path / 'imported')!r}).touch()\n\n\n"
        "@dataclass(frozen=True)\nclass Norm:\n    k: int = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "benchlab", raising=False)
    return tmp_path


def test_a_target_outside_the_house_is_refused_unimported_with_the_override_that_allows_it(lab: Path) -> None:
    choice = {"norm": {"_target_": "benchlab.Norm"}}
    message = (
        r"probe.norm._target_=benchlab.Norm is code from outside weightgeom.*'allow_targets=\[benchlab\.\*\]'"
    )
    with pytest.raises(ValueError, match=message):
        check_targets("probe", choice, [])
    assert not (lab / "imported").exists()
    check_targets("probe", choice, ["benchlab.*"])
    assert (lab / "imported").exists()


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.run",
        "builtins.exec",
        "torch.load",
        "weightgeom.models.pickled.shutil.rmtree",  # through a module of the house
        "runners.launcher.jobs.subprocess.Popen",
        "runners.disk.write_atomically",  # a function of the house, and no part of a run
        "benchlab.subprocess.run",  # through an allowed module
        "weightgeomx.Norm",
    ],
)
def test_no_target_leads_to_code_that_is_not_allowed(lab: Path, target: str) -> None:
    nested: dict[str, Any] = {"model": {"parts": [{"a": {"_target_": target, "args": ["touch"]}}]}}
    with pytest.raises(ValueError, match=r"model\.model\.parts\.0\.a\._target_=.* from outside weightgeom"):
        check_targets("model", nested, ["benchlab.*"])


def test_every_part_of_a_configuration_is_checked_before_anything_is_made(tmp_path: Path) -> None:
    for key in ("model", "data", "training", "objective", "probe.x", "intervention.x"):
        config = composed(f"++{key}={{_target_: os.mkdir, path: {tmp_path}/made}}")
        with pytest.raises(ValueError, match=rf"{key}\._target_=os.mkdir is code .*allow_targets=\[os\.\*\]"):
            parts(config)
    assert not (tmp_path / "made").exists()


def test_only_the_command_line_and_the_site_allow_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local/default.yaml").write_text("allow_targets: [site.*]\n")
    monkeypatch.setattr(compose, "CONF", tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["run.py", "--config-dir", "theirs", "+allow_targets=[mine.*, other.probes]"]
    )
    check_origin(["mine.*", "other.probes", "site.*"])
    message = r"a configuration file sets allow_targets to \['os\.\*'\], which only the command line"
    with pytest.raises(ValueError, match=message):
        check_origin(["mine.*", "os.*"])


def test_a_configuration_that_hydra_composes_does_not_allow_itself_anything(monkeypatch) -> None:
    config = composed("allow_targets=[os.*]")
    monkeypatch.setattr(HydraConfig, "initialized", staticmethod(lambda: True))
    with pytest.raises(ValueError, match="a configuration file sets allow_targets"):
        checked(config)


@pytest.mark.parametrize("value", ["mylab.*", "[1]", "null"])
def test_what_is_no_list_of_patterns_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"allow_targets must be a list such as \[mylab\.\*\]"):
        checked(composed(f"allow_targets={value}"))


def test_a_job_described_by_an_earlier_version_allows_nothing_and_verifies_once() -> None:
    plain: Any = OmegaConf.to_container(composed(), resolve=True)
    del plain["allow_targets"], plain["verify"]
    assert checked(plain)["allow_targets"] == [] and checked(plain)["verify"] is False


@pytest.mark.parametrize(
    "section",
    [
        {"callbacks": {"x": {"_target_": "os.system", "command": "true"}}},
        {"launcher": {"_target_": "hydra._internal.utils.sys.exit"}},  # through a module of Hydra
        {"job_logging": {"handlers": {"x": {"class": "logging.os.system"}}}},
        {"job_logging": {"formatters": {"x": {"()": "subprocess.run"}}}},
        {"job_logging": {"filters": [{"()": "benchlab.Norm"}]}},
        {
            "hydra_logging": {
                "handlers": {"x": {"class": "logging.StreamHandler", "stream": "ext://benchlab.x"}}
            }
        },
        {"sweeper": {"_target_": "${oc.env:HOME}"}},
    ],
)
def test_settings_of_hydra_lead_to_no_code_that_is_not_allowed(lab: Path, section: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"hydra\..* is code from outside weightgeom"):
        check_hydra(section, "hydra", [])
    assert not (lab / "imported").exists()


def test_code_in_settings_of_hydra_runs_where_it_is_allowed_and_what_hydra_brings_does(lab: Path) -> None:
    check_hydra({"callbacks": {"x": {"_target_": "benchlab.Norm"}}}, "hydra", ["benchlab.*"])
    known = (
        "hydra_plugins.weightgeom.SlurmLauncher",
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    )
    for target in (
        *known,
        "logging.FileHandler",
        "rich.logging.RichHandler",
        "runners.summary.warned.Warned",
    ):
        check_hydra({"x": {"_target_": target}}, "hydra", [])
