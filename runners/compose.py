"""Builds the objects that a configuration describes, after checking every key and type."""

import logging
import re
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from keyword import iskeyword
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from runners.errors import CONF, choices, explanation, nearest
from runners.modules import is_house, own_places, travelling

if TYPE_CHECKING:
    from runners.pipeline.experiment import Experiment
    from runners.signals import Interruption

KNOWN = ("weightgeom", "runners", "hydra", "logging", "rich", "colorlog")  # in Hydra's own settings
PLUGIN = re.compile(r"hydra_plugins(\.\w+)+\.[A-Z]\w*")
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
log = logging.getLogger(__name__)

OmegaConf.register_new_resolver("expanded", expanduser, replace=True)  # a tilde at the start of a path
FOUND_RIGHT: dict[str, list[str]] = {}  # the user's modules by configuration, without its seed
KINDS = {
    bool: "true or false",
    str: "text that is not empty",
    int: "a whole number",
    dict: "a mapping such as {key: value}",
    list: "a list such as [mylab.*]",
}
WORKERS = ("workers", "worker")  # keys of `probe` that are no probes
CHECKED = {
    **{"name": str, "seed": int, "outputs": str, "tracking_uri": str},
    **{"tags": dict, "only": dict, "report": bool, "verify": bool, "allow_targets": list},
}
TOP_LEVEL = (
    *("model", "data", "objective", "training", "probe", "intervention"),
    *("name", "seed", "device", "outputs", "tracking_uri", "tags", "only", "report", "plan"),
    *("allow_targets", "verify", "referee"),
)
EARLIER = ("on", True)  # names of an objective's `train_on`: YAML reads an unquoted `on` as true


def parts(config: DictConfig | dict[str, Any], here: bool = True) -> dict[str, Any]:
    """The objects that a configuration describes; building them checks every key and type.

    With `here`, the run takes place on this machine, so its device must exist.
    """
    plain = checked(config)
    for key in ("model", "data", "training", "objective", "probe", "intervention"):
        check_targets(key, plain.get(key), plain["allow_targets"])
    claims = claims_of(plain["referee"])
    check_targets("referee.claims", claims, plain["allow_targets"])
    return {
        **{key: build(key, plain.get(key)) for key in ("model", "data", "training")},
        "objective": build("objective", plain["objective"]) if plain["objective"].get("_target_") else None,
        **{
            f"{group}s": {
                key: build(f"{group}.{key}", choice) for key, choice in chosen(plain, group).items()
            }
            for group in ("probe", "intervention")
        },
        **workers_of(plain["probe"]),
        "claims": [built_claim(f"referee.claims.{index}", choice) for index, choice in enumerate(claims)],
        "device": device(plain.get("device"), here),
        **{key: plain[key] for key in ("name", "seed", "tracking_uri", "tags", "verify")},
    }


def checked(config: DictConfig | dict[str, Any]) -> dict[str, Any]:
    """A configuration as plain data, with its top-level keys checked."""
    plain: Any = config
    if isinstance(config, DictConfig):
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    if unknown := [str(key) for key in plain if key not in TOP_LEVEL]:
        raise KeyError(f"there is no top-level key {unknown[0]}; {nearest(unknown[0], TOP_LEVEL)}")
    plain |= {key: {} for key in ("tags", "only") if plain.get(key) is None}
    earlier = (("verify", False), ("allow_targets", []), ("referee", {}))
    for key, default in earlier:  # which earlier sweeps did not describe
        plain.setdefault(key, default)
    claims_of(plain["referee"])
    for key, kind in CHECKED.items():
        if type(plain.get(key)) is not kind or plain[key] == "":
            raise ValueError(f"{key} must be {KINDS[kind]}, got {plain.get(key)!r}")
    if not 0 <= plain["seed"] < 2**32:  # the range that NumPy accepts
        raise ValueError(f"seed must be 0 to {2**32 - 1}, got {plain['seed']}")
    if not isinstance(plan := plain.pop("plan", False), bool):
        raise ValueError(f"plan must be true or false, got {plan!r}")
    for key in ("objective", "probe", "intervention"):
        if not isinstance(plain.get(key), dict):
            raise ValueError(f"{key} must be one of the choices in conf/{key}, got {plain.get(key)!r}")
    plain["objective"] = renamed(plain["objective"])
    if not all(isinstance(pattern, str) for pattern in plain["allow_targets"]):
        raise ValueError(f"allow_targets must be a list such as [mylab.*], got {plain['allow_targets']!r}")
    if isinstance(config, DictConfig):
        drop_settings_without_a_choice(plain)
        if HydraConfig.initialized():
            check_origin(plain["allow_targets"])
    return plain


def chosen(plain: Mapping[str, Any], group: str) -> dict[str, Any]:
    """The probes or interventions of a configuration by name."""
    return {key: choice for key, choice in plain[group].items() if group != "probe" or key not in WORKERS}


def workers_of(probe: dict[str, Any]) -> dict[str, Any]:
    """The number of workers that measure, and the one that a run is, None for all of them."""
    workers, worker = (probe.get(key, default) for key, default in zip(WORKERS, (1, None), strict=True))
    if type(workers) is not int or workers < 1:
        raise ValueError(f"probe.workers must be 1 or more, got {workers!r}")
    if worker is not None and (type(worker) is not int or not 0 <= worker < workers):
        raise ValueError(
            f"probe.worker must be null or 0 to {workers - 1}, as probe.workers={workers}, got {worker!r}"
        )
    if worker is not None and workers == 1:
        raise ValueError("probe.worker=0 is one of several workers: set probe.workers to their number")
    return {"workers": workers, "worker": worker}


PUBLISHED = "published"  # in a list of claims, all that are in weightgeom/claims


def claims_of(referee: Any) -> list[dict[str, Any]]:
    """The claims of the key `referee`, each with its `_target_`; that of a claim alone may stand for it."""
    import weightgeom.claims

    listed = (referee or {}).get("claims", []) if isinstance(referee, dict | None) else referee
    if not isinstance(listed, list) or (isinstance(referee, dict) and set(referee) - {"claims"}):
        raise ValueError(
            f"referee must be claims: [published, mylab.claims.Mine] or a part of that, got {referee!r}"
        )
    claims: list[dict[str, Any]] = []
    for entry in listed:
        if entry == PUBLISHED:
            claims += [{"_target_": target} for target in weightgeom.claims.published()]
        elif isinstance(entry, str) and "." in entry:
            claims.append({"_target_": entry})
        elif isinstance(entry, dict) and "_target_" in entry:
            claims.append(entry)
        else:
            raise ValueError(
                f"referee.claims has {entry!r}: write {PUBLISHED}, the path of a class such as"
                " mylab.claims.Mine, or {_target_: mylab.claims.Mine, level: 0.5}"
            )
    return claims


def renamed(objective: dict[Any, Any]) -> dict[str, Any]:
    """The settings of one of our objectives, with `train_on` under that name."""
    if not str(objective.get("_target_")).startswith("weightgeom."):
        return objective
    earlier = [value for key, value in objective.items() if key in EARLIER]
    kept = {key: value for key, value in objective.items() if key not in EARLIER}
    return {**kept, "train_on": earlier[0]} if earlier else kept


def drop_settings_without_a_choice(plain: dict[str, Any]) -> None:
    """Remove settings of probes and interventions that are not selected, with a warning; mutates `plain`.

    They remain where an experiment sets a key of a probe, and the command line selects other probes.
    """
    for group in ("probe", "intervention"):
        left = [key for key, choice in plain[group].items() if _is_only_settings(choice)]
        for key in left and set(left).intersection(choices(group, search_path())):
            log.warning(
                "%s.%s is not selected, so its settings (%s) are not used",
                *(group, key, ", ".join(name for name, _ in flattened(plain[group].pop(key)))),
            )


def _is_only_settings(choice: object) -> bool:
    return isinstance(choice, dict) and "_target_" not in choice


def check_origin(allowed: list[str]) -> None:
    """Refuse an `allow_targets` from any other place than the command line and the site's conf/local.

    A configuration that comes with somebody's model or code must not allow itself to run code.
    """
    trusted = trusted_targets()
    if unknown := [pattern for pattern in allowed if pattern not in trusted]:
        raise ValueError(
            f"a configuration file sets allow_targets to {unknown}, which only the command line and"
            f" {CONF / 'local'} may do: read that code, then add {shlex.quote(_allowing(unknown))}"
        )


def trusted_targets() -> set[str]:
    """The patterns of `allow_targets` on the command line and in the site's conf/local."""
    given = [argument for argument in sys.argv[1:] if re.match(r"\+{0,2}allow_targets=", argument)]
    trusted = {name for argument in given for name in re.findall(r"[\w.*]+", argument.partition("=")[2])}
    for path in (CONF / "local").glob("*.yaml"):
        site: Any = OmegaConf.load(path)
        trusted |= {str(name) for name in site.get("allow_targets") or []}
    return trusted


def check_targets(key: str, choice: Any, allowed: Sequence[str]) -> None:
    """Refuse a `_target_` in a part of a configuration that is neither a class of the house nor allowed.

    Only modules that may run are imported. The module that defines the target counts, so that no target
    leads through a module that may run to one that may not.
    """
    if isinstance(choice, list):
        choice = dict(enumerate(choice))
    if not isinstance(choice, dict):
        return
    for name, value in choice.items():
        check_targets(f"{key}.{name}", value, allowed)
    target = choice.get("_target_")
    if not isinstance(target, str) or target in MOVED:
        return
    house = is_house(target)
    if house or _matches(target, allowed):
        try:
            resolved = get_object(target)
        except Exception:  # which instantiating it explains
            return
        home = f"{getattr(resolved, '__module__', '')}.{getattr(resolved, '__qualname__', '')}"
        if _matches(home, allowed) or (isinstance(resolved, type) and is_house(home)):
            return
        target = target if house else home
    raise ValueError(_foreign(f"{key}._target_", choice["_target_"], target))


def check_hydra(section: Any, key: str, allowed: Sequence[str]) -> None:
    """Refuse code from elsewhere in a part of Hydra's own settings, which runs before a run is checked.

    Callbacks, launchers and sweepers have a `_target_`; handlers and formatters of log lines have a `class`
    or `()`.
    """
    if isinstance(section, list):
        section = dict(enumerate(section))
    if isinstance(section, str) and section.startswith("ext://") and section not in STREAMS:
        raise ValueError(_foreign(key, section, section.removeprefix("ext://")))
    if not isinstance(section, dict):
        return
    for name, value in section.items():
        check_hydra(value, f"{key}.{name}", allowed)
    for name in {"_target_", "class", "()"} & section.keys():
        target = str(section[name])
        if not (_matches(target, allowed) or PLUGIN.fullmatch(target) or _is_known_class(target)):
            raise ValueError(_foreign(f"{key}.{name}", target, target))


def _is_known_class(target: str) -> bool:
    """Whether a class of the house, of Hydra or for log lines bears this name, also where it was defined."""
    if target.split(".")[0] not in KNOWN:
        return False
    try:
        resolved = get_object(target)
    except Exception:  # which Hydra explains
        return True
    return isinstance(resolved, type) and resolved.__module__.split(".")[0] in KNOWN


def _foreign(key: str, value: object, target: str) -> str:
    return (
        f"{key}={value} is code from outside weightgeom: read it, then let it run with"
        f" {shlex.quote(_allowing([target.partition('.')[0] + '.*']))}"
    )


def _matches(target: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(target, pattern) for pattern in patterns)


def _allowing(patterns: Sequence[str]) -> str:
    return f"allow_targets=[{','.join(patterns)}]"


def measured(plain: dict[str, Any], objective: str) -> dict[str, Any]:
    """A configuration without the probes and interventions that `only` keeps for other objectives."""
    only = plain["only"]
    sources = search_path() if only else []
    selected = [*chosen(plain, "probe"), *plain["intervention"]]  # a second instance has a name of its own
    measurements = sorted({*choices("probe", sources), *choices("intervention", sources), *selected})
    objectives = choices("objective", sources)
    for key, wanted in only.items():
        if key not in measurements:
            raise KeyError(f"only.{key} is no probe or intervention; {nearest(key, measurements)}")
        if not isinstance(wanted, list):
            raise ValueError(f"only.{key} must be a list of objectives such as [dpo, sft], got {wanted!r}")
        if unknown := [str(name) for name in wanted if name not in objectives]:
            raise KeyError(f"only.{key}: unknown objective {unknown[0]!r}; {nearest(unknown[0], objectives)}")
    kept = {
        group: {
            key: choice for key, choice in plain[group].items() if objective in only.get(key, [objective])
        }
        for group in ("probe", "intervention")
    }
    return {**plain, **kept}


def search_path() -> list[str]:
    """Hydra's config sources: conf/, --config-dir and hydra.searchpath."""
    return [f"{source.schema}://{source.path}" for source in HydraConfig.get().runtime.config_sources]


MOVED = {
    "weightgeom.chain.Chain": "weightgeom.bases.chain.Chain",
    "weightgeom.pretrained.Pretrained": "weightgeom.bases.pretrained.Pretrained",
    "weightgeom.pretrained.TwoCheckpoints": "weightgeom.bases.pretrained.TwoCheckpoints",
    "weightgeom.tiny.Tiny": "weightgeom.bases.tiny.Tiny",
    "weightgeom.training.Training": "weightgeom.training.config.Training",
}


def build(key: str, choice: Any) -> Any:
    """The object described by the part `key` of a configuration; unknown keys are refused."""
    if not isinstance(choice, dict) or "_target_" not in choice:
        raise ValueError(f"{key} must be one of the choices in conf/{key.split('.')[0]}, got {choice!r}")
    if choice["_target_"] in MOVED:
        raise ValueError(f"{choice['_target_']} has moved: write {key}._target_={MOVED[choice['_target_']]}")
    # A key that is a word of Python, such as model.from, is a field with an underscore behind it.
    choice = {f"{name}_" if iskeyword(name) else name: value for name, value in choice.items()}
    try:
        made = instantiate(choice, _convert_="all")
    except Exception as error:
        raise ValueError(explanation(error, key)) from error
    check_keys(key, choice, made)
    if not key.startswith("probe."):
        return made
    from weightgeom.estimators.per_matrix import as_probe

    try:
        return as_probe(made)
    except ValueError as error:
        raise ValueError(f"in {key}: {error}") from error


def built_claim(key: str, choice: dict[str, Any]) -> Any:
    """A claim, which must have all members that the referee asks for."""
    from weightgeom.analysis.referee import MEMBERS

    claim = build(key, choice)
    if lacking := [name for name in MEMBERS if name not in dir(claim)]:
        raise ValueError(
            f"{key}: {type(claim).__name__} is no claim, as it lacks {', '.join(lacking)}: a claim has"
            f" {', '.join(MEMBERS)}"
        )
    return claim


def check_keys(key: str, choice: dict[str, Any], made: object) -> None:
    """Raise KeyError for a key that is no field: pydantic's dataclasses ignore unknown keys."""
    if not is_dataclass(made):
        return
    names = [field.name for field in fields(made)]
    for name, value in choice.items():
        if name not in names and name != "_target_":
            valid = [field.removesuffix("_") for field in names]
            raise KeyError(f"there is no key {key}.{name}; {nearest(name, valid)}")
        if isinstance(value, dict):
            check_keys(f"{key}.{name}", value, getattr(made, name))


def described(config: DictConfig, common: Collection[str] = ()) -> dict[str, Any]:
    """A run as JSON: its configuration, directories and name, enough to start it in any process.

    The directories, choices and overrides are those of Hydra's current job. In a sweep the run's name leaves
    out the overrides that all jobs have in `common`.
    """
    hydra_config = HydraConfig.get()
    plain = checked(config)
    named = {key: hydra_config.runtime.choices[key] for key in ("model", "data", "objective", "training")}
    plain = measured(plain, named["objective"])
    asked = [override for override in hydra_config.overrides.task if override not in common]
    changed = [override for override in asked if not override.startswith("objective=")]
    swept = hydra_config.mode == RunMode.MULTIRUN
    return {
        "run_name": " ".join([named["objective"], *changed]),
        "config": plain,
        "params": {**dict(flattened(plain)), **named},
        "outputs": str(Path(config.outputs).expanduser().resolve()),
        "directory": str(Path(hydra_config.runtime.output_dir).resolve()),
        "parent": str(Path(hydra_config.sweep.dir).resolve() / "record") if swept else None,
    }


def experiment(
    run: dict[str, Any], interruption: "Interruption | None" = None, trained_on: str | None = None
) -> "Experiment":
    """The experiment for a run from `described`, which is announced first, as its imports take seconds.

    `interruption` passes on the scheduler's signals; `trained_on` is the device of a training that an earlier
    job has done.
    """
    from runners.summary.start import announce

    announce(run)
    from runners.pipeline.experiment import Experiment

    return Experiment(
        **parts(run["config"]),
        run_name=run["run_name"],
        outputs=Path(run["outputs"]),
        directory=Path(run["directory"]),
        params=run["params"],
        config=OmegaConf.to_yaml(OmegaConf.create(run["config"])),
        parent=None if run["parent"] is None else Path(run["parent"]),
        interruption=interruption,
        trained_on=trained_on,
    )


def flattened(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a nested configuration with its dotted key."""
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from flattened(value, f"{prefix}.{key}" if prefix else str(key))


def device(wanted: object, here: bool) -> str:
    """`cpu` or `cuda`; `auto` prefers the GPU. With `here`, a missing GPU is an error."""
    import torch

    if wanted not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {wanted!r}")
    if wanted == "cuda" and here and not torch.cuda.is_available():
        raise ValueError("device=cuda, and torch sees no GPU here: use device=cpu or device=auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def check(config: DictConfig, here: bool, common: Collection[str]) -> dict[str, Any]:
    """A job of a sweep, checked and described before any job starts; its data are read when it starts.

    With `here`, the job runs on this machine. `common` are the overrides that all jobs have.
    """
    # Checking takes seconds: of jobs that differ only in the seed or the worker, the first is checked.
    run = described(config, common)
    workers_of(run["config"]["probe"])
    plain = repr({**run["config"], "seed": None, "probe": {**run["config"]["probe"], "worker": None}})
    if plain not in FOUND_RIGHT:
        made = parts(run["config"], here)
        from runners.pipeline.experiment import check_parts

        keys = ("model", "objective", "training", "probes", "interventions", "tracking_uri", "name")
        check_parts(*(made[key] for key in keys))
        FOUND_RIGHT[plain] = travelling(run["config"], *made.values())
    return {**run, "modules": FOUND_RIGHT[plain], "path": own_places()}


def plan(
    jobs: Sequence[tuple[DictConfig, str]], parallel: int = 1, memory: float | None = None, nodes: int = 1
) -> None:
    """Print the downloads, time, memory and disk of jobs, `parallel` of them at a time.

    A job is its configuration and the name of its objective. `memory` is the bytes that each job has on each
    of its `nodes`, which are other machines; None stands for this one. Only a model's config is downloaded,
    and nothing is started.

    Raises:
        ValueError: if the jobs do not fit, with the override that makes them fit.
    """
    from runners.planning.plan import Planner
    from runners.planning.printing import show

    outputs = {str(config.outputs) for config, _ in jobs}
    if len(outputs) > 1:
        raise ValueError(
            f"plan=true takes one outputs= for all jobs of a sweep, got {', '.join(sorted(outputs))}"
        )
    plain = [measured(checked(config), objective) for config, objective in jobs]
    made = [(parts(config), config) for config in plain]
    place = Path(outputs.pop()).expanduser().resolve()
    planner = Planner(place, made[0][0]["device"], parallel, memory, nodes)
    if problems := show([planner.plan(*pair) for pair in made], planner):
        raise ValueError(f"does not fit: {'; '.join(problems)}")
