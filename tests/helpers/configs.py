"""Configurations composed as the command line does it."""

from copy import deepcopy
from functools import cache

from app import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

CONF = ROOT / "conf"
MANDATORY = {
    "data.train": ["data.train=[a.jsonl]"],
    "data.name": ["data.name=lab/data"],
    "model.revision": [f"model.revision={'0' * 40}"],
    "model.before": ["model.before=a"],
    "model.after": ["model.after=b"],
    "model.stages": ["model.stages={a: lab/a@v1, b: lab/b@v1}"],
    **{
        f"model.revisions.{stage}": [f"model.revisions.{stage}={'0' * 40}"]
        for stage in ("sft", "dpo", "rlvr")
    },
}


def composed(*overrides: str) -> DictConfig:
    """The whole configuration, with the mandatory keys filled in."""
    return deepcopy(_composed(*overrides))


@cache
def _composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", list(overrides))
        more = [value for key in OmegaConf.missing_keys(config) for value in MANDATORY[key]]
        return compose("config", [*overrides, *more]) if more else config
