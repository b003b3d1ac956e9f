import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from pydantic import Field
from pydantic.dataclasses import dataclass
from rich.console import Console

from runners.errors import CONF, choices, explanation, nearest, replace_unprintable


@dataclass(frozen=True)
class Inner:
    steps: int = Field(default=1, ge=1)


@dataclass(frozen=True)
class Outer:
    k: int | list[int] | None = None
    inner: Inner = Field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.k == 7:
            raise ValueError("k must not be 7")


def caught(action: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as info:
        action()
    return info.value


def composed(*overrides: str) -> Exception:
    def action() -> None:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            compose("config", list(overrides))

    return caught(action)


def test_the_nearest_name_comes_first_and_then_all_of_them() -> None:
    assert nearest("bta", ["tau", "beta"]) == "did you mean 'beta'? valid: beta, tau"
    assert nearest("xyz", ["tau", "beta"]) == "valid: beta, tau"


def test_choices_of_the_users_own_directories_are_choices(tmp_path: Path, monkeypatch) -> None:
    for name in ("conf/probe/norm.yaml", "conf/objective/mine/soft.yaml", "packed/conf/probe/deep.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    sources = [f"file://{tmp_path}/conf", "pkg://packed.conf", "structured://"]
    assert {*choices("probe", sources)} == {*choices("probe"), "norm", "deep"}
    assert "rsf" in choices("probe") and "mine/soft" in choices("objective", sources)

    def compose_wrongly(choice: str) -> str:
        def action() -> None:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                compose("config", [choice, f"hydra.searchpath=[file://{tmp_path}/conf]"])

        return explanation(caught(action))

    assert compose_wrongly("probe=[nrm]").startswith("there is no probe=nrm; did you mean 'norm'? valid: ali")
    assert compose_wrongly("objective=mine/sft").startswith(
        "there is no objective=mine/sft; did you mean 'mine/soft'? valid: "
    )
    message = compose_wrongly("objective=mine")
    assert message.startswith("there is no objective=mine; ") and "mine/soft, none, sft" in message


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"inner": {"steps": 0}}, "probe.x.inner.steps should be greater than or equal to 1, got 0"),
        ({"inner": {"steps": "a"}}, "probe.x.inner.steps should be a valid integer, got 'a'"),
        ({"k": "a"}, "probe.x.k should be a valid integer or a valid list, got 'a'"),
        ({"k": 7}, "probe.x: k must not be 7"),
        (
            {"k": "a", "inner": {"steps": 0}},
            "probe.x.k should be a valid integer or a valid list, got 'a'; "
            "probe.x.inner.steps should be greater than or equal to 1, got 0",
        ),
    ],
)
def test_a_value_that_pydantic_refuses_is_named_by_its_place_in_the_configuration(
    values: dict, sentence: str
) -> None:
    assert explanation(caught(lambda: Outer(**values)), "probe.x") == sentence


def test_the_error_for_an_unknown_choice_lists_the_valid_ones() -> None:
    error = explanation(composed("objective=dpoo"))
    assert error.startswith("there is no objective=dpoo; did you mean 'dpo'? valid: ")
    assert "ce, dpo" in error
    error = explanation(composed("probe=[rsf,behavior]"))
    assert error.startswith("there is no probe=behavior; did you mean 'behaviour'? valid: ")


def test_the_error_for_an_unknown_key_lists_the_valid_ones_and_how_to_add_one() -> None:
    assert explanation(composed("objective.betaa=1")) == (
        "there is no key objective.betaa; did you mean 'beta'? valid: beta, label_smoothing, loss_type,"
        " loss_weights, options, precompute_reference; add another field of weightgeom.objectives.dpo.DPO"
        " with a plus sign, +objective.betaa=..."
    )
    assert explanation(composed("trainin.steps=3")).startswith(
        "there is no key trainin; did you mean 'training'? valid: allow_targets, data, "
    )
    assert explanation(composed("tags.a=1")) == (
        "there is no key tags.a yet: add it with a plus sign, +tags.a=..."
    )


def test_the_error_for_a_missing_value_names_its_key() -> None:
    config = OmegaConf.create({"data": {"train": "???"}})
    assert explanation(caught(lambda: config.data.train)) == "data.train must be given: data.train=..."


def test_malformed_and_refused_overrides_are_named() -> None:
    assert explanation(composed("foo")).startswith("cannot read the argument 'foo': write key=value")
    assert explanation(composed("model.pretraining=[a]")).startswith("cannot set model.pretraining=[a]: ")
    assert explanation(composed("hydra.job.num=x")) == (
        "cannot set hydra.job.num=x: Value 'x' of type 'str' could not be converted to Integer"
    )


def test_the_error_for_a_broken_interpolation_names_its_key() -> None:
    config = OmegaConf.create({"name": "${nothere}"})
    error = explanation(caught(lambda: OmegaConf.to_container(config, resolve=True)))
    assert error == "name: Interpolation key 'nothere' not found"


def test_an_error_of_ours_keeps_its_sentence_whatever_its_cause() -> None:
    error = KeyError("no checkpoint at step 3; saved: 1, 2")
    error.__cause__ = caught(lambda: Outer(k="a"))  # pyright: ignore[reportArgumentType]
    assert explanation(error) == "no checkpoint at step 3; saved: 1, 2"
    assert explanation(ValueError("a sentence\n  over two lines")) == "a sentence over two lines"
    assert explanation(ValueError("bad"), "model") == "bad"


def test_an_error_of_ours_is_found_among_the_causes_of_another() -> None:
    error = RuntimeError("the worker ended")
    error.__cause__ = FileNotFoundError("no file a.txt in /data")
    assert explanation(error) == "no file a.txt in /data"
    assert explanation(error, "data") == "in data: no file a.txt in /data"


def test_a_suppressed_context_is_ignored() -> None:
    error = RuntimeError("the worker ended")
    error.__context__ = ValueError("suppressed")
    error.__suppress_context__ = True
    assert explanation(error).startswith("RuntimeError: the worker ended (the traceback: HYDRA_FULL_ERROR=1")


def test_the_explanation_of_a_bug_names_its_type_and_the_places_of_the_traceback() -> None:
    assert explanation(AssertionError()) == (
        "AssertionError: no message (the traceback: HYDRA_FULL_ERROR=1, or the run's traceback.txt)"
    )
    # A bare key, as in KeyError("weight_map"), comes from a bug.
    assert explanation(KeyError("weight_map")).startswith("KeyError: weight_map (the traceback")


def test_a_refusal_of_the_operating_system_names_the_path(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert explanation(caught((file / "jobs").mkdir)) == (
        f"cannot use {file}/jobs (not a directory): set outputs= to a writable directory"
    )
    assert explanation(caught((tmp_path / "none").read_text)) == (
        f"cannot use {tmp_path}/none (no such file or directory)"
    )
    nameless = OSError(errno.ENOSPC, "No space left on device")
    assert explanation(nameless) == "the disk is full: free space or set outputs= to another disk"
    full = OSError(errno.ENOSPC, "No space left on device", "/data/out")
    assert explanation(full) == (
        "the disk is full: could not write /data/out; free space or set outputs= to another disk"
    )


def test_the_error_for_several_values_without_a_sweep_names_the_flag() -> None:
    error = caught(
        lambda: _hydra_raises("Ambiguous value for argument 'objective=ce,dpo'\n1. To use it as ...")
    )
    assert explanation(error) == (
        "objective=ce,dpo gives several values: add -m to run each of them, or write a list as key=[a,b]"
    )


def _hydra_raises(text: str) -> None:
    raise ConfigCompositionException(text)


@pytest.mark.parametrize("value", ["modèle/avant", "a=b.txt", "a,b]", "日本語"])
def test_an_argument_that_hydra_cannot_read_is_shown_as_it_can(value: str) -> None:
    sentence = explanation(composed(f"data.train={value}"))
    assert 'quote values with , = brackets or letters outside ASCII: "' in sentence
    quoted = sentence.rpartition(": ")[2].strip('"')
    assert quoted == f"data.train='{value}'"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose("config", ["data=text", quoted]).data.train == value


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_directory_of_another_user_is_for_its_owner_to_open(tmp_path: Path, monkeypatch) -> None:
    stage = tmp_path / "rsf"
    stage.mkdir()
    os.chown(stage, 4321, -1)
    monkeypatch.setattr(os, "access", lambda place, mode: mode == os.F_OK and Path(place).exists())
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(stage / "new"))
    assert explanation(error) == (
        f"cannot use {stage}/new (permission denied): let user 4321, who owns it, run chmod -R g+rwX {stage},"
        " or set outputs= to a writable directory"
    )


def test_a_table_is_printed_in_an_encoding_without_its_characters(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    replace_unprintable()
    Console().print("1.5 ± 0.1 Δ")
    sys.stdout.flush()
    assert written.getvalue() == b"1.5 ? 0.1 ?\n"


def test_a_closed_output_stays_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    replace_unprintable()
