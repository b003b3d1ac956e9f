"""The command `weightgeom`, called in this process."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from app import ROOT, environment
from configs import CONF, composed
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from typer.testing import CliRunner, Result

from runners.cli.app import PLURALS, app
from runners.cli.choices import reference
from runners.cli.compare import compared, quoted
from runners.cli.run import _whole_path

CHOICES = [
    path for path in CONF.rglob("*.yaml") if len(path.relative_to(CONF).parts) > 1 and path.stem != "rich"
]


@pytest.fixture
def weightgeom(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *arguments: CliRunner().invoke(app, arguments, prog_name="weightgeom")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=str)
def test_the_help_shows_every_command_group_choice_and_key(
    weightgeom: Callable[..., Result], arguments: list[str]
) -> None:
    ended = weightgeom(*arguments)
    assert ended.exit_code == 0
    words = ended.stdout.replace("*", " ").split()
    assert {"run", "compare", "sweep", "sync", "report", "check", "list"} <= set(words)
    for path in CHOICES:
        assert path.stem in words or f"{path.parent.name}/{path.stem}" in words
    lines = [line.strip() for line in ended.stdout.splitlines()]
    assert any(line.startswith("seed: 0        # of training, probes and controls;") for line in lines)
    assert "k: null         # dimension of the subspaces, or a list; null: d/8" in lines
    assert not any("_target_" in line or line.startswith("hydra:") for line in lines)


def test_the_help_of_a_run_shows_the_keys_of_the_choices_that_it_is_given(tmp_path: Path) -> None:
    text = reference(["model=pair", "+probe=[moments, spectrum]", "experiment=causal"])
    assert "model=pair: Two existing checkpoints" in text
    assert "alignment behaviour connectivity moments* overlap rotation rsf sparsity spectrum*" in " ".join(
        text.split()
    )
    assert "\n  positions: scored" in text and "\n  top: 16" in text and "causal*" in text
    assert "model=tiny:" not in text and "probe=rsf:" not in text
    mine = tmp_path / "probe/mine.yaml"
    mine.parent.mkdir()
    mine.write_text("# Mine.\nmine:\n  _target_: lab.Mine\n  width: 3  # in layers\n")
    for flag in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"], ["-cd", str(tmp_path)]):
        assert "probe=mine: Mine.\n  width: 3  # in layers" in reference([*flag, "probe=[mine]"])


def test_every_key_of_the_choices_that_config_yaml_makes_says_what_it_means() -> None:
    lines = [line for line in reference().splitlines() if ": " in line and line.startswith("  ")]
    assert [line for line in lines if "#" not in line and "${" not in line] == []


@pytest.mark.parametrize("path", CHOICES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_choice_starts_with_one_sentence_on_what_it_is(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# ") and lines[0].endswith(".")
    assert len(lines[0]) <= 130


@pytest.mark.parametrize("plural", PLURALS)
def test_a_list_has_one_line_for_every_choice(weightgeom: Callable[..., Result], plural: str) -> None:
    folder = CONF / PLURALS[plural]
    names = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")}
    lines = weightgeom("list", plural).stdout.splitlines()
    assert {line.split()[0] for line in lines} == names and len(lines) == len(names)
    assert all(len(line.split()) > 2 for line in lines)


def test_the_lists_are_of_all_groups() -> None:
    defaults = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    groups = {key for entry in defaults if isinstance(entry, dict) for key in entry if " " not in key}
    assert set(PLURALS.values()) == groups


def test_an_unknown_list_is_refused_with_the_nearest(weightgeom: Callable[..., Result]) -> None:
    ended = weightgeom("list", "modles")
    assert ended.exit_code == 2
    assert "unknown group 'modles'; did you mean 'models'?" in " ".join(ended.output.split())


def test_the_version_is_that_of_the_distribution(weightgeom: Callable[..., Result]) -> None:
    assert weightgeom("--version").stdout == f"weightgeom {metadata.version('weightgeom')}\n"


# Hydra reads ??? as a value that must still be given, whatever the quotes.
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
TRAPS = st.lists(st.sampled_from([*"'\"\\${}[]=,: #~a1", "${", "null", "\\'"]), min_size=1).map("".join)


@given(st.one_of(TEXTS, TRAPS).filter(lambda text: text != "???"))
def test_a_quoted_path_reaches_the_configuration_as_it_is(path: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(f"key={quoted(path)}")
    assert not override.is_sweep_override()
    assert OmegaConf.to_container(OmegaConf.create({"key": override.value()}), resolve=True) == {"key": path}


def test_a_path_that_exists_needs_no_quotes_on_the_command_line(tmp_path: Path) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    for name in ("x{y}", "a,b", "it's", "é", "a=[1,2]", "a b", "(c)", "50%", "a\nb", "#1", "null"):
        (path := tmp_path / name).mkdir()
        override = parser.parse_override(_whole_path(f"+model.name={path}"))
        assert not override.is_sweep_override() and override.value() == str(path)
    for argument in ("seed=0,1", "probe=[rsf]", f"model.name={tmp_path}/none,other", "-m", "x='a,b'", "x="):
        assert _whole_path(argument) == argument


def test_a_comparison_is_a_run_without_a_training() -> None:
    awkward = "a b=c,d/it's"
    config = composed(*compared(awkward, "lab/b@v1", [Path("x=1.txt"), Path("y.txt")], 4, Path("o,p")))
    assert config.objective._target_ is None
    assert (config.model.before, config.model.after) == (awkward, "lab/b@v1")
    assert config.data.train == ["x=1.txt", "y.txt"] and config.outputs == "o,p"
    assert config.probe.rsf.k == 4
    unset = composed(*compared("a", "b", [Path("x")], None, Path("outputs")))
    assert unset.probe.rsf.k is None


def test_a_comparison_needs_a_text_that_exists(
    weightgeom: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, sentence in [
        ([], "Missing option '--text'"),
        (["--text", "no.txt"], "'no.txt' does not exist"),
        (["--text", __file__, "--k", "0"], "Invalid value for '--k'"),
    ]:
        ended = weightgeom("compare", "a", "b", *arguments)
        assert ended.exit_code == 2 and sentence in " ".join(ended.output.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "usage"),
    [
        (["sweep", "--help"], "weightgeom sweep [-h] {status,wait,cancel,resubmit}"),
        (["sweep", "resubmit", "--help"], "weightgeom sweep resubmit [-h] [--new-code] SWEEP_DIR"),
        (["sync", "--help"], "weightgeom sync [-h] [--tracking-uri TRACKING_URI] [outputs]"),
        (["report", "--help"], "weightgeom report [-h]"),
        (["check", "--help"], "weightgeom check [-h] model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_other_commands_take_all_that_their_modules_take(
    weightgeom: Callable[..., Result], arguments: list[str], usage: str
) -> None:
    ended = weightgeom(*arguments)
    assert ended.exit_code == 0
    assert " ".join(ended.stdout.split()).startswith(f"usage: {usage}")


def test_the_exit_code_is_that_of_the_command(weightgeom: Callable[..., Result], tmp_path: Path) -> None:
    ended = weightgeom("sweep", "status", str(tmp_path))
    assert ended.exit_code == 1
    assert ended.stderr.startswith(f"error: {tmp_path} holds no sweep")
    assert weightgeom("sync", str(tmp_path / "nowhere")).exit_code == 2
    assert weightgeom("sync", str(tmp_path)).exit_code == 0


def test_help_lists_and_version_load_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom runners.cli.app import app\n"
        "for asked in (['--help'], ['list', 'models'], ['--version'], ['compare', '--help']):\n"
        "    assert CliRunner().invoke(app, asked).exit_code == 0\n"
        "print(*sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment({"PYTHONPATH": f"{ROOT}{os.pathsep}"}),
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name.partition(".")[0] for name in ended.stdout.split()}
    assert "typer" in loaded
    heavy = {"torch", "transformers", "mlflow", "trl", "pandas", "numpy", "hydra", "matplotlib"}
    assert not loaded & heavy
