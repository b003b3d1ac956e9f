import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from pydantic import Field
from pydantic.dataclasses import dataclass

from runners.errors import CONF, complaint, nearest


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


@pytest.mark.parametrize(
    ("values", "said"),
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
    values: dict, said: str
) -> None:
    assert complaint(caught(lambda: Outer(**values)), "probe.x") == said


def test_a_choice_that_does_not_exist_is_told_with_those_that_do() -> None:
    said = complaint(composed("objective=dpoo"))
    assert said.startswith("there is no objective=dpoo; did you mean 'dpo'? valid: ") and "ce, dpo" in said
    said = complaint(composed("probe=[rsf,behavior]"))
    assert said.startswith("there is no probe=behavior; did you mean 'behaviour'? valid: ")


def test_a_key_that_does_not_exist_is_told_with_those_that_do_and_how_to_add_one() -> None:
    assert complaint(composed("objective.betaa=1")) == (
        "there is no key objective.betaa; did you mean 'beta'? valid: beta, label_smoothing, loss_type,"
        " loss_weights, options, and with a plus sign, +objective.betaa=..., whatever else"
        " weightgeom.objectives.dpo.DPO has"
    )
    assert complaint(composed("trainin.steps=3")).startswith(
        "there is no key trainin; did you mean 'training'? valid: data, device, "
    )
    assert complaint(composed("tags.a=1")) == (
        "there is no key tags.a yet: add it with a plus sign, +tags.a=..."
    )


def test_a_key_without_a_value_is_asked_for() -> None:
    config = OmegaConf.create({"data": {"train": "???"}})
    assert complaint(caught(lambda: config.data.train)) == "data.train must be given: data.train=..."


def test_what_is_no_override_and_what_cannot_be_set_are_named() -> None:
    assert complaint(composed("foo")).startswith("cannot read the argument 'foo': write key=value")
    assert complaint(composed("tags=[a]")).startswith("cannot set tags=[a]: ")
    assert complaint(composed("hydra.job.num=x")) == (
        "cannot set hydra.job.num=x: Value 'x' of type 'str' could not be converted to Integer"
    )


def test_an_interpolation_that_leads_nowhere_is_named_with_its_key() -> None:
    config = OmegaConf.create({"name": "${nothere}"})
    said = complaint(caught(lambda: OmegaConf.to_container(config, resolve=True)))
    assert said == "name: Interpolation key 'nothere' not found"


def test_an_error_of_ours_is_told_as_it_is_whatever_lies_behind_it() -> None:
    error = KeyError("no checkpoint at step 3; saved: 1, 2")
    error.__cause__ = caught(lambda: Outer(k="a"))  # pyright: ignore[reportArgumentType]
    assert complaint(error) == "no checkpoint at step 3; saved: 1, 2"
    assert complaint(ValueError("a sentence\n  over two lines")) == "a sentence over two lines"
    assert complaint(ValueError("bad"), "model") == "bad"


def test_an_error_of_ours_is_found_behind_another() -> None:
    error = RuntimeError("the worker ended")
    error.__cause__ = FileNotFoundError("no file a.txt in /data")
    assert complaint(error) == "no file a.txt in /data"
    assert complaint(error, "data") == "in data: no file a.txt in /data"


def test_what_was_silenced_is_not_told() -> None:
    error = RuntimeError("the worker ended")
    error.__context__ = ValueError("of no interest")
    error.__suppress_context__ = True
    assert complaint(error).startswith("RuntimeError: the worker ended (the traceback: HYDRA_FULL_ERROR=1")


def test_a_bug_is_told_with_its_type_and_where_the_traceback_is() -> None:
    assert complaint(AssertionError()) == (
        "AssertionError: no message (the traceback: HYDRA_FULL_ERROR=1, or the run's traceback.txt)"
    )
    # A bare key is no sentence.
    assert complaint(KeyError("weight_map")).startswith("KeyError: weight_map (the traceback")


def test_what_the_operating_system_refuses_is_told_with_the_path(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert complaint(caught((file / "jobs").mkdir)) == (
        f"cannot use {file}/jobs (not a directory): set outputs= to a directory that can be written"
    )
    assert complaint(caught((tmp_path / "none").read_text)) == (
        f"cannot use {tmp_path}/none (no such file or directory)"
    )
    nameless = OSError(errno.ENOSPC, "No space left on device")
    assert complaint(nameless) == "the disk is full: free space or set outputs= to another disk"
    full = OSError(errno.ENOSPC, "No space left on device", "/data/out")
    assert complaint(full) == (
        "the disk is full: could not write /data/out; free space or set outputs= to another disk"
    )


def test_several_values_without_a_sweep_are_told_with_the_flag_that_they_need() -> None:
    error = caught(
        lambda: _hydra_raises("Ambiguous value for argument 'objective=ce,dpo'\n1. To use it as ...")
    )
    assert complaint(error) == (
        "objective=ce,dpo gives several values: add -m to run each of them, or write a list as key=[a,b]"
    )


def _hydra_raises(text: str) -> None:
    raise ConfigCompositionException(text)
