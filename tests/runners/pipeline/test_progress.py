import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich import get_console

from runners.pipeline.progress import Foreseen, Meter, Progress, earlier, seconds_of, shown

ASKED: dict[str, object] = {"base": "pretraining/1", "probe": {"k": 4}, "device": "cpu"}


def finished(outputs: Path, key: str, seconds: float, **specification: object) -> None:
    """A stage `rsf` that took `seconds`."""
    directory = outputs / "rsf" / key
    directory.mkdir(parents=True)
    (directory / "spec.json").write_text(json.dumps(specification))
    (directory / "DONE").touch()
    os.utime(directory / "spec.json", (1000.0, 1000.0))
    os.utime(directory / "DONE", (1000.0 + seconds, 1000.0 + seconds))


def stage(label: str = "rsf", asked: Mapping[str, object] = {}, made: bool = False) -> Foreseen:
    return Foreseen("rsf", label, made, 6, asked)


def test_a_stage_takes_as_long_as_the_last_one_like_it_in_proportion_to_its_checkpoints(tmp_path):
    finished(tmp_path, "a", 30.0, **ASKED, seed=0, steps=[0, 1, 2])
    finished(tmp_path, "b", 99.0, **ASKED | {"base": "another"}, steps=[0, 1, 2])
    assert earlier(tmp_path, stage(asked=ASKED | {"seed": 1})) == 60.0  # six checkpoints, not three
    assert earlier(tmp_path, stage(asked=ASKED | {"device": "cuda"})) is None
    assert earlier(tmp_path, stage()) is None  # whose key is unknown


def test_the_time_left_is_that_of_the_stages_to_be_made_and_names_the_unknown(tmp_path):
    finished(tmp_path, "a", 30.0, **ASKED, steps=[0, 1, 2])
    stages = [stage("one", made=True), stage("two", ASKED), stage("three", ASKED), stage("four")]
    assert seconds_of(tmp_path, stages) == (120.0, ["four"])
    progress = Progress(tmp_path, stages)
    progress.begin("one")
    progress.end()
    progress.begin("two")
    assert progress.head == "2 of 4 two"
    assert progress.left() == (60.0, ["four"])


def test_a_stage_says_its_time_by_its_own_steps_and_that_of_the_run_only_if_known(tmp_path):
    finished(tmp_path, "a", 30.0, **ASKED, steps=[0, 1, 2])
    stages = [stage("one", ASKED), stage("two", ASKED)]
    progress = Progress(tmp_path, stages)
    progress.begin("one")
    meter = Meter(progress, 6)
    assert meter.rest() == "60 s left, 2 min in all"  # 60 s, and 60 s of the other
    meter.began -= 20.0
    meter.advance(1, {})
    assert meter.left() == pytest.approx(100.0, abs=1.0)  # one of six steps in 20 s
    progress.stages = [stage("one", ASKED), stage("two")]
    assert Meter(progress, 6).rest() == "60 s left, then 1 more"
    progress.stages = [stage("one"), stage("two")]
    assert Meter(progress, 6).rest() == ""


def test_where_there_is_no_terminal_a_line_is_logged_again_and_again(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(get_console(), "_force_terminal", False)
    progress = Progress(tmp_path, [stage("one"), stage("two")])
    progress.begin("one")
    with caplog.at_level(logging.INFO), shown(progress, 6, every=0.01) as advance:
        advance(3, {"loss": 0.5})
        while len(caplog.messages) < 3:
            pass
    assert caplog.messages[0] == "stage 1 of 2 one: 0 of 6"
    assert caplog.messages[-1].startswith("stage 1 of 2 one: 3 of 6, loss 0.500")


def test_in_a_terminal_a_bar_takes_the_place_of_lines(tmp_path, caplog, monkeypatch, capsys):
    monkeypatch.setattr(get_console(), "_force_terminal", True)
    monkeypatch.setattr(get_console(), "_width", 80)
    progress = Progress(tmp_path, [stage("one"), stage("two")])
    progress.begin("one")
    with caplog.at_level(logging.INFO), shown(progress, 6, every=0.01) as advance:
        advance(6, {"loss": 0.5})
    assert not caplog.messages and "1 of 2 one" in capsys.readouterr().out


def test_an_interrupted_run_says_what_is_kept_and_how_to_go_on(tmp_path):
    progress = Progress(tmp_path, [stage("pretraining"), stage("training"), stage("rsf")])
    assert list(progress.interrupted("python run.py")) == [
        f"kept under {tmp_path}: no stage yet",
        "the same command goes on: python run.py",
    ]
    progress.begin("pretraining")
    progress.end()
    progress.begin("training")
    progress.directory = tmp_path / "training"
    assert "training starts again, as it has saved no state" in list(progress.interrupted(""))
    for step in (8, 16):
        (tmp_path / "training" / f"checkpoint-{step}").mkdir(parents=True)
    assert list(progress.interrupted("python run.py")) == [
        "interrupted in stage 2 of 3 training",
        f"kept under {tmp_path}: pretraining",
        "training goes on from step 16",
        "the same command goes on: python run.py",
    ]


@pytest.mark.parametrize("content", ["[]", "null", "torn", "[" * 100_000, '{"steps": 3}'])
def test_a_damaged_description_of_a_stage_tells_no_time(content, tmp_path):
    finished(tmp_path, "a", 30.0)
    (tmp_path / "rsf/a/spec.json").write_text(content)
    assert earlier(tmp_path, stage(asked={"steps": 3})) is None
