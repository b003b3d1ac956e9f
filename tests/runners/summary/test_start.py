import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from runners.summary.commands import again, open_mlflow, over_seeds, report
from runners.summary.start import banner, data_line, foreign, foreseen_lines
from weightgeom.text.examples import Examples

WORLD = {"_target_": "weightgeom.data.world.World", "preference": "style"}
TEXT = {"_target_": "weightgeom.data.text.TextFiles", "train": ["a.txt", "b.txt"], "heldout": None}

# By an earlier run, so the world is their text.
MADE = {"before": "/home/me/outputs/pretraining/1/step-4", "after": "/home/me/outputs/training/2/step-2"}


def described(model: dict[str, Any], data: dict[str, Any], choice: str = "world") -> dict[str, Any]:
    config = {
        "name": "scratch", "model": model, "data": data, "objective": {"_target_": "DPO", "beta": 0.1},
        "training": {"steps": 64, "batch_size": 24}, "probe": {"rsf": {}, "behaviour": {}},
        "intervention": {}, "device": "auto",
    }  # fmt: skip
    params = {"model": "tiny", "data": choice, "objective": "dpo", "training": "short"}
    return {"config": config, "params": params, "run_name": "dpo probe=[rsf]", "outputs": "/home/me/outputs"}


@pytest.mark.parametrize("width", [80, 120])
def test_the_banner_names_model_data_objective_and_device(width: int) -> None:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(banner(described({"d_model": 32}, TEXT, "text")))
    lines = [line.rstrip() for line in captured.get().splitlines()]
    assert lines == [
        "run        scratch: dpo probe=[rsf]",
        "model      tiny",
        "data       text (train=a.txt b.txt)",
        "objective  dpo",
        "training   short, 64 steps of 24",
        "probes     rsf, behaviour",
        "device     auto: the GPU if there is one, else the CPU",
        "outputs    /home/me/outputs",
    ]


@pytest.mark.parametrize(
    ("model", "data", "warned"),
    [
        ({"before": "/models/a", "after": "/models/b"}, WORLD, True),
        ({"name": "EleutherAI/pythia-{size}", "size": "70m"}, WORLD, True),
        ({"stages": {"base": "a", "sft": "b"}}, WORLD, True),
        ({"before": "/models/a", "after": "/models/b"}, TEXT, False),
        ({"d_model": 32, "corpus": None}, WORLD, False),
        (MADE, WORLD, False),
    ],
)
def test_the_generated_text_under_a_model_from_elsewhere_is_warned_of(
    model: dict[str, Any], data: dict[str, Any], warned: bool
) -> None:
    assert foreign(described(model, data)) == warned


def test_the_data_are_named_and_counted() -> None:
    examples = Examples("my.txt", ["a"] * 2000, ["b"] * 9, [], [], digest="")
    assert data_line(examples) == "data: my.txt, 2,000 documents and 9 held out"


def test_the_stages_are_named_with_an_honest_estimate() -> None:
    assert list(foreseen_lines(["pretraining"], ["training", "rsf"], 180.0, [])) == [
        "reused: pretraining",
        "to make: training, rsf",
        "time: about 3 min, by earlier stages like these",
    ]
    assert list(foreseen_lines([], ["training", "rsf"], 180.0, ["rsf"]))[-1] == (
        "time: about 3 min, by earlier stages like these, without rsf: not timed here before"
    )
    assert "no estimate yet" in list(foreseen_lines([], ["rsf"], 0.0, ["rsf"]))[-1]
    assert list(foreseen_lines(["rsf"], [], 0.0, []))[-1] == "to make: nothing, all stages are here already"


def test_commands_are_quoted_for_a_shell_and_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["seed=3", "tracking_uri=https://me:pw@host", "tags={a: b}"]
    arguments = ["run.py", "--config-dir", "my conf", *given]
    monkeypatch.setattr(sys, "argv", arguments)
    _, _, rest = again().partition(" ")
    assert rest == "run.py --config-dir 'my conf' seed=3 tracking_uri=https://***@host 'tags={a: b}'"
    _, _, rest = over_seeds().partition("run.py ")
    assert rest == ("--config-dir 'my conf' seed=0,1,2 tracking_uri=https://***@host 'tags={a: b}' -m")
    monkeypatch.setattr(sys, "argv", ["/opt/bin/weightgeom", "objective=ce"])
    assert again() == "weightgeom run objective=ce"
    assert over_seeds() == "weightgeom run seed=0,1,2 objective=ce -m"


def test_the_report_needs_no_option_that_is_its_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    outputs = tmp_path / "outputs"
    assert report("study", outputs, f"sqlite:///{outputs}/mlflow.db") == "weightgeom report study"
    elsewhere = report("study", tmp_path / "o", "http://host:5000")
    assert elsewhere.endswith(f"study --outputs {tmp_path}/o --tracking-uri http://host:5000")


def test_the_runs_table_of_mlflow_has_an_address() -> None:
    table = "/#/experiments/7/runs?workflowType=machine_learning"
    assert open_mlflow("https://mlflow.example/", "7") == [f"https://mlflow.example{table}"]
    command, address = open_mlflow("sqlite:////out put/mlflow.db", "7")
    assert command.endswith(
        "mlflow ui --backend-store-uri 'sqlite:////out put/mlflow.db' --host 127.0.0.1 --port 5000"
    )
    assert address == f"http://127.0.0.1:5000{table}"
