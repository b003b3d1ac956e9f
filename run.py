"""Hydra in, objects out: `python run.py`, with `-m` for a sweep, with `--help` for the choices."""

import logging
import os
import re
import sys
import traceback
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from runners.complaints import choices, complaint, nearest
from runners.launcher import register
from runners.modules import own_places, travelling
from runners.processes import share_processors

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from runners.experiment import Experiment
    from runners.interruption import Interruption

VERBOSE = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
PLANNED = re.compile(r"\+{0,2}plan=(?i:true|on|yes|1)")
FOUND_RIGHT: dict[str, list[str]] = {}  # modules by configuration of this sweep, without its seed
KINDS = {
    bool: "true or false",
    str: "text that is not empty",
    int: "a whole number",
    dict: "a mapping such as {key: value}",
}
CHECKED = {
    **{"name": str, "seed": int, "outputs": str, "tracking_uri": str},
    **{"tags": dict, "only": dict, "report": bool},
}


def parts(config: DictConfig | dict[str, Any], here: bool = True) -> dict[str, Any]:
    """The objects that a configuration describes: building them checks every key and type of it.

    `here` says that it is this machine that needs the device.
    """
    plain = checked(config)
    return {
        **{key: build(key, plain.get(key)) for key in ("model", "data", "training")},
        "objective": build("objective", plain["objective"]) if plain["objective"].get("_target_") else None,
        **{
            f"{group}s": {key: build(f"{group}.{key}", choice) for key, choice in plain[group].items()}
            for group in ("probe", "intervention")
        },
        "device": device(plain.get("device"), here),
        **{key: plain[key] for key in ("name", "seed", "tracking_uri", "tags")},
    }


def checked(config: DictConfig | dict[str, Any]) -> dict[str, Any]:
    """A configuration as plain data, what belongs to no part of it checked."""
    plain: Any = config
    if isinstance(config, DictConfig):
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    for key, kind in CHECKED.items():
        if type(plain.get(key)) is not kind or plain[key] == "":
            raise ValueError(f"{key} must be {KINDS[kind]}, got {plain.get(key)!r}")
    if not 0 <= plain["seed"] < 2**32:  # what NumPy takes
        raise ValueError(f"seed must be 0 to {2**32 - 1}, got {plain['seed']}")
    if not isinstance(plan := plain.pop("plan", False), bool):
        raise ValueError(f"plan must be true or false, got {plan!r}")
    for key in ("objective", "probe", "intervention"):
        if not isinstance(plain.get(key), dict):
            raise ValueError(f"{key} must be one of the choices in conf/{key}, got {plain.get(key)!r}")
    return plain


def measured(plain: dict[str, Any], objective: str) -> dict[str, Any]:
    """A configuration without the probes and interventions that are there `only` for other objectives."""
    only = plain["only"]
    sources = search_path() if only else []
    there = [*choices("probe", sources), *choices("intervention", sources)]
    objectives = choices("objective", sources)
    for key, wanted in only.items():
        if key not in there:
            raise KeyError(f"only.{key} is no probe or intervention; {nearest(key, there)}")
        if not isinstance(wanted, list):
            raise ValueError(f"only.{key} must be a list of objectives such as [dpo, sft], got {wanted!r}")
        if unknown := [str(one) for one in wanted if one not in objectives]:
            raise KeyError(f"only.{key} has no objective {unknown[0]!r}; {nearest(unknown[0], objectives)}")
    kept = {
        group: {key: one for key, one in plain[group].items() if objective in only.get(key, [objective])}
        for group in ("probe", "intervention")
    }
    return {**plain, **kept}


def search_path() -> list[str]:
    """The places that Hydra takes choices from: conf/, and those of --config-dir and hydra.searchpath."""
    from hydra.core.hydra_config import HydraConfig  # noqa: PLC0415 (not needed for --help)

    return [f"{source.schema}://{source.path}" for source in HydraConfig.get().runtime.config_sources]


def build(key: str, choice: Any) -> Any:
    """The object that the part `key` of a configuration describes; refuses keys that it does not have."""
    from hydra.utils import instantiate  # noqa: PLC0415 (not needed for --help)

    if not isinstance(choice, dict) or "_target_" not in choice:
        raise ValueError(f"{key} must be one of the choices in conf/{key.split('.')[0]}, got {choice!r}")
    try:
        made = instantiate(choice, _convert_="all")
    except Exception as error:
        raise ValueError(complaint(error, key)) from error
    check_keys(key, choice, made)
    return made


def check_keys(key: str, choice: dict[str, Any], made: object) -> None:
    """Raise KeyError for a key that became no field: pydantic's dataclasses pass over those they lack."""
    if not is_dataclass(made):
        return
    names = [field.name for field in fields(made)]
    for name, value in choice.items():
        if name not in names and name != "_target_":
            raise KeyError(f"there is no key {key}.{name}; {nearest(name, names)}")
        if isinstance(value, dict):
            check_keys(f"{key}.{name}", value, getattr(made, name))


def described(config: DictConfig, common: "Collection[str]" = ()) -> dict[str, Any]:
    """A run as plain data, JSON that any process can take up: its configuration and its places.

    Hydra has chosen the places, and knows the choices and what was asked for on the command line. A run of
    a sweep is named by what tells it from the others, which is not what is `common` to all of them.
    """
    from pathlib import Path  # noqa: PLC0415 (not needed for --help)

    from hydra.core.hydra_config import HydraConfig  # noqa: PLC0415
    from hydra.types import RunMode  # noqa: PLC0415

    hydra_config = HydraConfig.get()
    plain = checked(config)
    chosen = {key: hydra_config.runtime.choices[key] for key in ("model", "data", "objective", "training")}
    plain = measured(plain, chosen["objective"])
    asked = [override for override in hydra_config.overrides.task if override not in common]
    changed = [override for override in asked if not override.startswith("objective=")]
    swept = hydra_config.mode == RunMode.MULTIRUN
    return {
        "run_name": " ".join([chosen["objective"], *changed]),
        "config": plain,
        "params": {**dict(flattened(plain)), **chosen},
        "outputs": str(Path(config.outputs).resolve()),
        "directory": str(Path(hydra_config.runtime.output_dir).resolve()),
        "parent": str(Path(hydra_config.sweep.dir).resolve() / "record") if swept else None,
    }


def experiment(run: dict[str, Any], interruption: "Interruption | None" = None) -> "Experiment":
    """The experiment that `described` has described; the machine's signals reach it by `interruption`."""
    from pathlib import Path  # noqa: PLC0415 (not needed for --help)

    from runners.experiment import Experiment  # noqa: PLC0415 (heavy)

    return Experiment(
        **parts(run["config"]),
        run_name=run["run_name"],
        outputs=Path(run["outputs"]),
        directory=Path(run["directory"]),
        params=run["params"],
        config=OmegaConf.to_yaml(OmegaConf.create(run["config"])),
        parent=None if run["parent"] is None else Path(run["parent"]),
        interruption=interruption,
    )


def flattened(tree: Any, prefix: str = "") -> "Iterator[tuple[str, Any]]":
    """Every leaf of a nested configuration with its dotted key."""
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from flattened(value, f"{prefix}.{key}" if prefix else str(key))


def device(wanted: object, here: bool) -> str:
    """`cpu` or `cuda`; `auto` is the accelerator where there is one. `here` says that it is needed here."""
    import torch  # noqa: PLC0415 (heavy)

    if wanted not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {wanted!r}")
    if wanted == "cuda" and here and not torch.cuda.is_available():
        raise ValueError("device=cuda, and torch sees no GPU here: use device=cpu or device=auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def job(config: DictConfig) -> None:
    """One run; its traceback, if it fails, goes beside its record. Those of a sweep are launched instead."""
    from pathlib import Path  # noqa: PLC0415 (not needed for --help)

    from hydra.core.hydra_config import HydraConfig  # noqa: PLC0415

    try:
        if config.plan:
            checked(config)
            return plan([(config, HydraConfig.get().runtime.choices["objective"])])
        run = described(config)
        experiment(run).run()
        if run["config"]["report"]:
            from runners.report import make  # noqa: PLC0415 (heavy)

            page = make([run["config"]["name"]], run["config"]["tracking_uri"], Path(run["outputs"]))
            print(f"report: {page}")
    except Exception as error:
        with suppress(OSError):  # the disk may be full: that is then the error to tell
            Path(HydraConfig.get().runtime.output_dir, "traceback.txt").write_text(traceback.format_exc())
        end(error)  # Hydra would put a line of its own before it
        raise


def check(config: DictConfig, here: bool, common: "Collection[str]") -> dict[str, Any]:
    """Refuse a job of a sweep before any of its jobs starts, and describe it; its data are read when it does.

    `here` says that it will run on this machine; `common` are the overrides that all jobs have.
    """
    # Jobs that differ in nothing but the seed are all right if one of them is: that one takes the time.
    run = described(config, common)
    plain = repr({**run["config"], "seed": None})
    if plain not in FOUND_RIGHT:
        made = parts(run["config"], here)
        from runners.experiment import check_parts  # noqa: PLC0415 (heavy)

        keys = ("model", "objective", "training", "probes", "interventions", "tracking_uri")
        check_parts(*(made[key] for key in keys))
        FOUND_RIGHT[plain] = travelling(run["config"], *made.values())
    return {**run, "modules": FOUND_RIGHT[plain], "path": own_places()}


def plan(jobs: "Sequence[tuple[DictConfig, str]]", parallel: int = 1, memory: float | None = None) -> None:
    """Tell what jobs would fetch, take and need, `parallel` of them at a time; raises if it does not fit.

    A job is its configuration and the name of its objective. `memory` is what each has elsewhere, in bytes;
    None is for this machine. Nothing of theirs is started, made or downloaded, but a model's config.
    """
    from pathlib import Path  # noqa: PLC0415 (not needed for --help)

    from runners.plan import Planner  # noqa: PLC0415 (heavy)
    from runners.verdict import show  # noqa: PLC0415 (heavy)

    outputs = {str(config.outputs) for config, _ in jobs}
    if len(outputs) > 1:
        raise ValueError(
            f"plan=true takes one outputs= for all jobs of a sweep, got {', '.join(sorted(outputs))}"
        )
    plain = [measured(checked(config), objective) for config, objective in jobs]
    made = [(parts(config), config) for config in plain]
    planner = Planner(Path(outputs.pop()).resolve(), made[0][0]["device"], parallel, memory)
    if problems := show([planner.plan(*one) for one in made], planner):
        raise ValueError(f"does not fit: {'; '.join(problems)}")


register(check, plan)


def end(error: Exception) -> None:
    """Tell in one sentence what went wrong, and exit with 1; with HYDRA_FULL_ERROR=1 return to raise it."""
    if not VERBOSE:
        print(f"error: {complaint(error)}", file=sys.stderr)
        sys.exit(1)


@contextmanager
def nothing_left() -> "Iterator[None]":
    """Within it, Hydra makes the directory of a run or a sweep where it does not stay."""
    from tempfile import TemporaryDirectory  # noqa: PLC0415 (not needed for --help)

    with TemporaryDirectory() as directory:
        place = next(index for index, one in enumerate(sys.argv) if PLANNED.fullmatch(one))
        # Beside it: overrides that do not stand together are refused.
        sys.argv[place:place] = [f"hydra.run.dir={directory}/run", f"hydra.sweep.dir={directory}/sweep"]
        yield


def main() -> None:
    """Run Hydra; whatever goes wrong is told in one sentence, with a non-zero exit."""
    share_processors()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them itself
    logging.raiseExceptions = VERBOSE  # a log line that a full disk does not take is no news of its own
    try:
        with nothing_left() if any(map(PLANNED.fullmatch, sys.argv)) else nullcontext():
            job()
    except Exception as error:
        end(error)
        raise
    except KeyboardInterrupt:
        if VERBOSE:
            raise
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
