"""The application from end to end, each claim on a run of `run.py` in a process of its own."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from math import isfinite
from pathlib import Path

import pandas as pd
import pytest
from app import BEHAVIOUR, ROOT, SMALL, WORLD, Ended, done, environment, fresh_run, run, status
from mlflow import MlflowClient
from mlflow.entities import Run
from numpy.testing import assert_allclose
from pandas.testing import assert_frame_equal

from runners.pipeline.fingerprint import code_behind

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)
APART = {f"rsf{past}{end}" for past in ("", "_pretraining") for end in ("_means", "_parameters")}
TABLES = {"rsf", "rsf_pretraining", "behaviour", "behaviour_pretraining"} | APART


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this module work, with the `outputs` that they share."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def default(home: Path) -> Ended:
    return fresh_run(home, *SMALL, *WORLD, "+tags.note=first")


@pytest.fixture(scope="module")
def pair(home: Path, default: Ended) -> list[str]:
    """The overrides that name the first and the last checkpoint of the default run."""
    assert default.code == 0
    (base,) = done(home / "outputs", "pretraining")
    stages = done(home / "outputs", "training")
    (trained,) = (path for path in stages if json.loads((path / "spec.json").read_text())["seed"] == 0)
    return ["model=pair", f"model.before={base / 'step-4'}", f"model.after={trained / 'step-2'}"]


@pytest.fixture(scope="module")
def text(home: Path) -> Path:
    path = home / "text.txt"
    path.write_text(
        "\n\n".join(f"Document {n} tells of {n * n} things, and of nothing else." for n in range(80))
    )
    return path


def published(home: Path, experiment: str) -> dict[str, Run]:
    """The MLflow runs of an experiment by name."""
    client = MlflowClient(f"sqlite:///{home}/outputs/mlflow.db")
    experiment_of_name = client.get_experiment_by_name(experiment)
    assert experiment_of_name is not None
    return {run.info.run_name or "": run for run in client.search_runs([experiment_of_name.experiment_id])}


def tables(record: Path) -> dict[str, pd.DataFrame]:
    return {path.stem: pd.read_parquet(path) for path in (record / "artifacts/tables").glob("*.parquet")}


def test_the_default_job_pretrains_aligns_measures_both_and_says_where_to_look(
    home: Path, default: Ended
) -> None:
    assert default.code == 0, default.err
    assert {len(done(home / "outputs", stage)) for stage in ("pretraining", "training")} == {1}
    written = tables(default.record)
    assert set(written) == TABLES
    # Checkpoints at the powers of two and the last: of 4 steps of pretraining and 2 of training.
    assert set(written["rsf_pretraining"]["step"]) == {0, 1, 2, 4}
    assert set(written["rsf"]["step"]) == {0, 1, 2}
    assert set(written["rsf"].query("quantity == 'ratio'")["matrix"]) == {"q", "k", "v", "o", "up", "down"}
    assert f"mlflow ui --backend-store-uri sqlite:///{home}/outputs/mlflow.db" in default.out
    assert "24 pairs: 0 dropped" in default.out
    assert status(default.record)["status"] == "FINISHED"


def test_a_run_says_at_once_what_it_does_and_at_its_end_what_came_out(home: Path, default: Ended) -> None:
    lines = [line.rstrip() for line in default.out.splitlines()]
    start = lines[: lines.index("loading torch and transformers, and checking all parts ...")]
    assert {"model      tiny", "data       world (preference=style)", "device     cpu"} <= set(start)
    stages = "rsf (pretraining), behaviour (pretraining), training, rsf, behaviour"
    assert f"to make: pretraining, {stages}" in lines
    assert "data: world-style, 60 documents and 8 held out, 24 pairs and 8 held out" in lines
    # Piped, so the stages are lines and no bars.
    progress = [line for line in lines if "stage 4 of 6 training: 0 of 2" in line]
    assert len(progress) == 1 and "4 of 6 training ━" not in default.out
    (answer,) = (line for line in lines if line.startswith("answer: "))
    assert re.fullmatch(
        r"answer: read [\d.]+ times chance, write [\d.]+ times, of at most 8; null 1 ± [\d.]+", answer
    )
    assert f"figures: {default.record}/artifacts/figures" in lines
    (experiment,) = MlflowClient(f"sqlite:///{home}/outputs/mlflow.db").search_experiments(
        filter_string="name = 'scratch'"
    )
    page = f"#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
    assert f"then open: http://127.0.0.1:5000/{page}" in lines
    assert [line for line in lines if line.startswith("next: ") and "seed=0,1,2" in line]
    note = json.loads((default.record / "run.json").read_text())["tags"]["mlflow.note.content"]
    assert note.startswith(f"**{answer.removeprefix('answer: ')}**")


def test_every_stage_is_bound_to_the_code_that_made_it(home: Path, default: Ended) -> None:
    assert default.code == 0
    neox, table = "weightgeom.architectures.gpt_neox", ("weightgeom.models.loading", "weightgeom.table")
    expected = {
        "pretraining": code_behind("weightgeom.bases.tiny"),
        "training": code_behind("weightgeom.objectives.dpo", "weightgeom.training.fit", neox),
        "rsf": code_behind("weightgeom.probes.rsf", *table, neox),
        "behaviour": code_behind("weightgeom.probes.behaviour", *table, neox),
    }
    assert len(set(expected.values())) == len(expected)
    for stage, code in expected.items():
        for directory in done(home / "outputs", stage):
            assert json.loads((directory / "spec.json").read_text())["code"] == code


def test_every_number_of_a_run_has_a_unit_and_an_n_and_is_finite(default: Ended) -> None:
    for table in tables(default.record).values():
        assert all(isfinite(value) for value in table["value"])
        assert all(unit != "" for unit in table["unit"])
        assert all(n > 0 for n in table["n"])


def test_mlflow_has_the_metrics_parameters_tags_and_data_of_a_run(home: Path, default: Ended) -> None:
    client = MlflowClient(f"sqlite:///{home}/outputs/mlflow.db")
    name = " ".join(["dpo", *SMALL, *WORLD, "+tags.note=first"])
    (published_run,) = (
        run for run in published(home, "scratch").values() if run.data.tags.get("note") == "first"
    )
    assert (published_run.info.run_name or "").startswith(name[:200])  # a longer one is cut
    identity = published_run.info.run_id

    def curve(key: str) -> dict[int, float]:
        return {point.step: point.value for point in client.get_metric_history(identity, key)}

    assert published_run.info.status == "FINISHED"
    assert set(curve("train/loss")) == {1, 2}
    assert set(curve("pretraining/loss")) == {1, 2, 4}  # the first and every second
    rsf, behaviour = (
        pd.read_parquet(f"{default.record}/artifacts/tables/{n}.parquet") for n in ("rsf", "behaviour")
    )
    ratio = rsf.query("quantity == 'ratio' and matrix == 'q' and subspace == 'attention_input'")
    assert curve("rsf/q") == {step: ratio[ratio["step"] == step]["value"].mean() for step in (1, 2)}
    last = ratio[ratio["step"] == 2]
    assert curve("rsf_by_layer/q") == dict(zip(last["layer"], last["value"], strict=True))
    heldout = behaviour[behaviour["quantity"] == "heldout_ce"]
    assert curve("behaviour/heldout_ce") == dict(zip(heldout["step"], heldout["value"], strict=True))
    assert {"rsf_pretraining/q", "behaviour_pretraining/heldout_ce"} <= set(published_run.data.metrics)
    assert len(published_run.data.metrics) <= 50
    params = published_run.data.params
    assert params["objective"] == "dpo" and params["training.steps"] == "2" and params["seed"] == "0"
    tags = published_run.data.tags
    assert tags["note"] == "first" and {"code_fingerprint", "host", "git_commit"} <= set(tags)
    assert published_run.inputs is not None
    (data,) = published_run.inputs.dataset_inputs
    assert data.dataset.name == "world-style"


def test_mlflow_has_the_artifacts_of_a_run(home: Path, default: Ended) -> None:
    client = MlflowClient(f"sqlite:///{home}/outputs/mlflow.db")
    (published_run,) = [
        run for run in published(home, "scratch").values() if run.data.tags.get("note") == "first"
    ]

    def names(folder: str | None) -> set[str]:
        return {item.path for item in client.list_artifacts(published_run.info.run_id, folder)}

    assert {"config.yaml", "environment.txt", "figures", "tables"} <= names(None)
    assert names("tables") == {f"tables/{name}.{ending}" for name in TABLES for ending in ("parquet", "csv")}
    drawn = ("ratio_by_step", "ratio_by_layer", "ratio_by_layer_pretraining")
    assert names("figures") == {f"figures/{name}.{ending}" for name in drawn for ending in ("png", "pdf")}


def test_all_probes_together_show_the_mechanism_and_stay_within_what_mlflow_shows(
    home: Path, default: Ended
) -> None:
    assert default.code == 0
    probes = ["rsf", "behaviour", "moments", "spectrum", "overlap"]
    ended = run(home, *SMALL, *WORLD, f"probe=[{','.join(probes)}]", "probe.moments.tokens=256", "name=all")
    assert ended.code == 0, ended.err
    written = tables(ended.record)
    assert set(written) == {name + suffix for name in probes for suffix in ("", "_pretraining")} | APART
    assert not len(written["moments_pretraining"])  # whose objective is not known, and whose start is random
    mechanism = written["moments"]
    assert (
        set(mechanism["step"]) == {1, 2} and len(mechanism[mechanism["quantity"] == "measured_ratio"]) == 24
    )
    # One update and one text; the probes sum it in groups of their own, in fp32.
    ratios = [
        table.query(f"quantity == '{quantity}' and subspace != 'random'")["value"].to_numpy()
        for table, quantity in ((written["rsf"], "ratio"), (mechanism, "measured_ratio"))
    ]
    assert_allclose(*ratios, rtol=1e-4)
    figures = {path.name for path in (ended.record / "artifacts/figures").iterdir()}
    assert {"mechanism.png", "mechanism.pdf"} <= figures
    for title in (
        "Relative subspace fraction (rsf)",
        "What the trainings achieved (behaviour)",
        "The mechanism (moments)",
    ):
        assert [line for line in ended.out.splitlines() if line.strip() == title]
    lines = [line.strip("│").split("│") for line in ended.out.splitlines() if "correlation" in line]
    shown = {role.strip(): [cell.strip() for cell in cells] for role, _, *cells in lines}
    (published_run,) = published(home, "all").values()
    metrics = published_run.data.metrics
    for role in ("read", "write"):
        names = ("predicted", "forecast", "forecast_adam")
        values = [metrics[f"moments/{role}_{name}_correlation"] for name in names]
        assert shown[role] == [*(f"{value:.2f}" for value in values), "1"]
    of_last = mechanism.query("quantity == 'write_forecast_correlation' and step == 2")["value"]
    assert metrics["moments/write_forecast_correlation"] == of_last.item()
    assert len(metrics) <= 70  # MLflow's pages slow down beyond some 50


def test_another_seed_reuses_the_base(home: Path, default: Ended) -> None:
    before = done(home / "outputs", "pretraining")
    again = run(home, *SMALL, *WORLD, "seed=1")
    assert again.code == 0, again.err
    (base,) = before
    assert f"reusing {base}" in again.out
    lines = again.out.splitlines()
    assert "reused: pretraining" in lines  # the random control subspaces are the seed's
    # As long as those of the first seed, whose training was the same but for its seed.
    assert [line for line in lines if re.fullmatch(r"time: about .*\d.*, by earlier stages like these", line)]
    assert set((home / "outputs/pretraining").iterdir()) == {base, base.with_suffix(".lock")}
    assert len(done(home / "outputs", "training")) == 2
    first, second = tables(default.record), tables(again.record)
    assert not first["rsf"]["value"].equals(second["rsf"]["value"])


def test_no_objective_measures_the_pretraining(home: Path, default: Ended) -> None:
    ended = run(home, *SMALL, *WORLD, "objective=none")
    assert ended.code == 0, ended.err
    written = tables(ended.record)
    assert set(written) == {"rsf", "rsf_means", "rsf_parameters", "behaviour"}
    assert_frame_equal(written["rsf"], tables(default.record)["rsf_pretraining"], check_exact=True)


def test_a_pair_of_checkpoints_is_compared_on_a_text_of_the_users(
    home: Path, default: Ended, pair: list[str], text: Path
) -> None:
    small = [override for override in SMALL if "model." not in override]
    ended = run(home, *small, *pair, "objective=none", "data=text", f"data.train={text}")
    assert ended.code == 0, ended.err
    rows = tables(ended.record)["rsf"]
    assert set(rows["step"]) == {0, 1}
    norm = "quantity == 'delta_norm'"
    trained = tables(default.record)["rsf"].query(f"{norm} and step == 2")["value"]
    # The same two checkpoints: the update is the one that the run which made them has measured.
    assert rows.query(f"{norm} and step == 1")["value"].tolist() == trained.tolist()


def test_two_equal_checkpoints_have_a_table_of_zeros_and_are_said_to_be_equal(
    home: Path, pair: list[str], text: Path
) -> None:
    small = [override for override in SMALL if "model." not in override]
    chosen, before, _ = pair
    equal = home / "equal"
    shutil.copytree(before.partition("=")[2], equal)
    asked = [chosen, before, f"model.after={equal}", "objective=none", f"data.train={text}", "data=text"]
    ended = run(home, *small, *asked)
    assert ended.code == 0, ended.err
    rows = tables(ended.record)["rsf"].query("step == 1")
    assert set(rows[rows["parameter"] == ""]["quantity"]) == {"delta_norm", "moved_share"}
    assert set(rows["value"]) == {0.0}
    sentence = "the two checkpoints, before and after, are equal: no matrix differs"
    assert f"answer: {sentence}" in ended.out.splitlines()
    assert "Relative subspace fraction (rsf): nothing moved" in ended.out


def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(home: Path, default: Ended) -> None:
    assert default.code == 0
    asked = [*SMALL, *WORLD, "seed=7", "training.steps=5000", "training.log_every=5000"]
    command = [sys.executable, str(ROOT / "run.py"), *asked]
    with subprocess.Popen(
        command, cwd=home, env=environment({}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        lines, signalled = [], False
        for line in process.stdout:
            lines.append(line.rstrip())
            # Once: the line that the signal finds on its way out is printed again.
            if "training the model by dpo" in line and not signalled:
                process.send_signal(signal.SIGINT)
                signalled = True
        assert process.wait() == 130 and "interrupted" in process.stderr.read()
    assert "interrupted in stage 4 of 6 training" in lines
    kept = f"kept under {home}/outputs: pretraining, rsf (pretraining), behaviour (pretraining)"
    end = "\n".join(lines[-5:])
    assert kept in lines, end
    assert "training starts again, as it has saved no state" in lines, end
    (go_on,) = (line for line in lines if line.startswith("the same command goes on: "))
    assert shlex.split(go_on.partition(": ")[2])[1:] == command[1:]


def test_cross_entropy_on_a_text_of_the_users(home: Path, text: Path) -> None:
    small = [*SMALL, "model.vocabulary=300"]
    ended = run(home, *small, "data=text", f"data.train={text}", "objective=ce")
    assert ended.code == 0, ended.err
    assert "72 documents packed end to end" in ended.out  # of 80, every tenth is held out
    neox = "weightgeom.architectures.gpt_neox"
    code = code_behind("weightgeom.objectives.ce", "weightgeom.training.fit", neox)
    specifications = [(path / "spec.json").read_text() for path in done(home / "outputs", "training")]
    assert code in {json.loads(specification)["code"] for specification in specifications}
    assert {"heldout_ce", "kl_from_base"} == set(tables(ended.record)["behaviour"]["quantity"])


def test_preferences_of_the_users_are_trained_on_and_what_is_cut_is_counted(home: Path) -> None:
    path = home / "pairs.jsonl"
    pairs = [
        {"prompt": f"Question {n}? ", "chosen": "It is so. " * (1 + 20 * (n == 3)), "rejected": "It is not. "}
        for n in range(20)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in pairs))
    ended = run(
        home, *SMALL, "data=preferences", f"data.train={path}", "model.vocabulary=300", "model.context=64"
    )
    assert ended.code == 0, ended.err
    assert "18 pairs: 0 dropped (prompt of 48 tokens or more), 1 truncated to 48 tokens" in ended.out
    assert "preference_margin" in set(tables(ended.record)["behaviour"]["quantity"])


def test_a_sweep_is_one_parent_with_a_child_for_every_job(home: Path, default: Ended) -> None:
    ended = run(home, *BEHAVIOUR, *WORLD, "name=sweep", "objective=ce,dpo", "seed=0,1", "-m")
    assert ended.code == 0, ended.err
    runs = list(published(home, "sweep").values())
    assert [run.info.status for run in runs] == ["FINISHED"] * 5
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    asked = {(run.data.params["objective"], run.data.params["seed"]) for run in children}
    assert asked == {("ce", "0"), ("ce", "1"), ("dpo", "0"), ("dpo", "1")}


def test_a_job_that_fails_does_not_stop_the_other_jobs_of_a_sweep_but_fails_it(
    home: Path, default: Ended
) -> None:
    rates = "training.learning_rate=1e-4,1e30,1e-3"
    ended = run(home, *BEHAVIOUR, *WORLD, "name=failing", rates, "-m")
    assert ended.code == 1
    assert len(ended.errors) == 1 and "1 of 3 jobs of the sweep" in ended.errors[0]
    assert "Traceback" not in ended.err
    assert "failed:" in ended.out and "training diverged" in ended.out
    runs = published(home, "failing").values()
    by_rate = {run.data.params.get("training.learning_rate"): run.info.status for run in runs}
    assert by_rate == {None: "FAILED", "0.0001": "FINISHED", "1e+30": "FAILED", "0.001": "FINISHED"}


def test_the_same_command_gives_the_same_tables_bit_for_bit(
    home: Path, default: Ended, tmp_path: Path
) -> None:
    again = run(tmp_path, *SMALL, *WORLD, "+tags.note=first")
    assert again.code == 0, again.err
    kept = {
        place: {path.relative_to(place): pd.read_parquet(path) for path in place.glob("*/*/*.parquet")}
        for place in (home / "outputs", tmp_path / "outputs")
    }
    first, second = kept.values()
    assert len(second) == 4 and set(second) <= set(first)  # the signatures are equal, too
    for name, table in second.items():
        assert_frame_equal(table, first[name], check_exact=True)
    for name, table in tables(again.record).items():
        assert_frame_equal(table, tables(default.record)[name], check_exact=True)


def test_a_tracking_server_that_is_down_costs_a_warning_and_no_result(home: Path, default: Ended) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    ended = run(home, *SMALL, *WORLD, f"tracking_uri=http://127.0.0.1:{port}")
    assert ended.code == 0, ended.err
    assert ended.out.count("could not publish to MLflow") == 2  # when it happens, and at the end
    assert set(tables(ended.record)) == TABLES
    assert status(ended.record)["status"] == "FINISHED"


def seconds(*arguments: str) -> float:
    """The least processor time of three: what it takes where nobody else works."""
    costs = []
    for _ in range(3):
        before = os.times()
        subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment({}), check=True, capture_output=True
        )
        after = os.times()
        costs.append(sum(after[2:4]) - sum(before[2:4]))  # of the children, user and system
    return min(costs)


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]])
def test_the_help_and_the_configuration_come_almost_as_fast_as_from_hydra_alone(
    arguments: list[str],
) -> None:
    bare = (
        "import hydra\n"
        f"app = hydra.main(config_path={str(ROOT / 'conf')!r}, config_name='config', version_base='1.3')\n"
        "app(lambda config: None)()"
    )
    assert seconds("run.py", *arguments) <= 1.5 * seconds("-c", bare, *arguments)


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]])
def test_the_help_and_the_configuration_load_nothing_heavy(arguments: list[str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "run.py", *arguments],
        cwd=ROOT,
        env=environment({}),
        check=True,
        capture_output=True,
        text=True,
    )
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in ended.stderr.splitlines()}
    assert "hydra" in loaded
    assert not loaded & {"torch", "transformers", "trl", "mlflow", "pandas", "numpy"}
