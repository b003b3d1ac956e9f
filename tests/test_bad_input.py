"""Every mistake in a user's input ends in one sentence, before any file is made."""

import json
import logging
import runpy
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
import torch
from app import BEHAVIOUR, ROOT, WORLD, Ended, done, environment, run, status
from disk import small_disk
from mlflow import MlflowClient
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, XGLMConfig

from weightgeom.models.residual import architecture_of
from weightgeom.models.weights import open_params

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)
Refuse = Callable[..., str]


@pytest.fixture
def refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Refuse]:
    """Runs `run.py` in this process, which saves seconds per case, and returns its one-sentence error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    handlers, level = list(logging.root.handlers), logging.root.level

    def refused(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # `run.py` sets it
        capsys.readouterr()  # drops the output of a test's preparations
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 1
        assert line.startswith("error: ")
        assert not [*tmp_path.rglob("DONE"), *tmp_path.rglob("run.json"), *tmp_path.rglob("mlflow.db")]
        return line.removeprefix("error: ")

    yield refused
    for handler in logging.root.handlers:
        if handler not in handlers:
            handler.close()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            "objective=kto training.processes=2",
            "the loss of kto relates the examples of a batch to each other",
        ),
        ("training.processes=5", "training: batch_size=24 does not divide among 5 processes: set training."),
        (
            "model._target_=weightgeom.tiny.Tiny",
            "weightgeom.tiny.Tiny has moved: write model._target_=weightgeom.bases.tiny.Tiny",
        ),
        ("objective=dpoo", "there is no objective=dpoo; did you mean 'dpo'? valid: ce, dpo, "),
        ("probe=[rsf,behavior]", "there is no probe=behavior; did you mean 'behaviour'? valid: alignment, "),
        ("objective.betaa=1", "there is no key objective.betaa; did you mean 'beta'? valid: beta, "),
        ("trainin.steps=3", "there is no key trainin; did you mean 'training'? valid: allow_targets, data, "),
        ("probe.rsf.kk=3", "there is no key probe.rsf.kk; did you mean 'k'? valid: at, budget_gb, "),
        ("+probe.rsf.kk=3", "there is no key probe.rsf.kk; did you mean 'k'? valid: at, budget_gb, "),
        ("+model.pretraining.stepps=3", "there is no key model.pretraining.stepps; did you mean 'steps'? "),
        ("training.steps=abc", "training.steps should be a valid integer, got 'abc'"),
        ("seed=x", "seed must be a whole number, got 'x'"),
        ("seed=true", "seed must be a whole number, got True"),
        ("seed=-1", "seed must be 0 to 4294967295, got -1"),
        ("objective.beta=[1]", "objective.beta should be a valid number, got [1]"),
        ("probe.rsf.k=foo", "probe.rsf.k should be a valid integer or a valid list, got 'foo'"),
        ("probe.rsf.at=strt", "probe.rsf.at should be 'auto', 'start', 'step' or 'end', got 'strt'"),
        ("outputs=null", "outputs must be text that is not empty, got None"),
        ("objective.beta=inf", "objective.beta must be a finite number, got inf"),
        (
            "outputs=s3://me:hunter2hunter2@bucket/x",
            "outputs=s3://***@bucket/x is an address: set outputs= to a directory of this machine",
        ),
        ("training.steps=0", "training.steps should be greater than or equal to 1, got 0"),
        ("objective.beta=-1", "objective.beta should be greater than 0, got -1"),
        ("probe.rsf.k=1000", "probe.rsf.k must be 1 to 128, the width of the residual stream, got 1000"),
        ("probe.rsf.k=0", "probe.rsf.k must be 1 to 128, the width of the residual stream, got 0"),
        ("probe.rsf=null", "probe.rsf must be one of the choices in conf/probe, got None"),
        ("report=maybe", "report must be true or false, got 'maybe'"),
        ("+only.rank11=[dpo]", "only.rank11 is no probe or intervention; did you mean 'rank1'? valid: "),
        ("+only.rank1=dpo", "only.rank1 must be a list of objectives such as [dpo, sft], got 'dpo'"),
        ("+only.rank1=[dpoo]", "only.rank1: unknown objective 'dpoo'; did you mean 'dpo'? valid: ce, dpo, "),
        ("~objective", "objective must be one of the choices in conf/objective, got None"),
        ("model.heads=3", "model: d_model must be a multiple of heads, got 128 and 3"),
        ("data=text", "data.train must be given: data.train=..."),
        ("model=pair objective=none", "model.before must be given: model.before=..."),
        ("model=pair model.before=a model.after=b", "model=pair compares two finished checkpoints: set obj"),
        ("model=pair model.before=./a model.after=./b objective=none", "no directory ./a: give a "),
        ("objective=none model=pythia", "objective=none on a single checkpoint leaves no update to measure"),
        (
            "objective.loss_type=sigmoidd",
            "objective: unknown loss_type 'sigmoidd'; choose from sigmoid, hinge",
        ),
        ("tracking_uri=foo://x", "tracking_uri 'foo://x' is not supported: use sqlite:///PATH/mlflow.db"),
        ("device=gpu", "device must be auto, cpu or cuda, got 'gpu'"),
        ("name=", "name must be text that is not empty, got ''"),
        ("tags=3", "tags must be a mapping such as {key: value}, got 3"),
        ("tags.note=3", "there is no key tags.note yet: add it with a plus sign, +tags.note=..."),
        ("outputs=/proc/outputs", "cannot use /proc/outputs (no such file or directory)"),
        ("data=text data.train=none.txt", "no file none.txt in "),
        ("objective=ce,dpo", "objective=ce,dpo gives several values: add -m to run each of them"),
        ("seed", "cannot read the argument 'seed': write key=value"),
        ("seed=0,1,abc -m", "job 2 of the sweep (seed=abc): seed must be a whole number, got 'abc'; nothing"),
        ("probe.rsf.k=8,16,1000 -m", "job 2 of the sweep (probe.rsf.k=1000): probe.rsf.k must be 1 to 128"),
        ("objective=ce,dpo,dpoo -m", "there is no objective=dpoo; did you mean 'dpo'? valid: ce, dpo, "),
        ("device=gpu -m", "job 0 of the sweep (device=gpu): device must be auto, cpu or cuda, got 'gpu'"),
    ],
)
def test_a_mistake_on_the_command_line_gets_one_sentence(
    refuse: Refuse, overrides: str, sentence: str
) -> None:
    assert refuse(*overrides.split()).startswith(sentence)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_cuda_without_a_gpu_is_refused(refuse: Refuse) -> None:
    error = refuse("device=cuda")
    assert error == "device=cuda, and torch sees no GPU here: use device=cpu or device=auto"


@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["run", "sweep"])
def test_an_outputs_setting_that_names_a_file_is_refused(
    refuse: Refuse, tmp_path: Path, sweep: list[str]
) -> None:
    (tmp_path / "file").touch()
    error = refuse("outputs=file", *sweep)
    assert error.startswith("cannot use ") and "file/jobs" in error
    assert error.endswith("(not a directory): set outputs= to a writable directory")


@pytest.mark.parametrize(
    ("choice", "lines", "sentence"),
    [
        ("data=text", "", "{path} is empty: it contains no record"),
        (
            "data=text",
            '{"text": "a"}\n{"txt": "b"}\n',
            "{path} line 2 has no field 'text'; its fields are txt",
        ),
        ("data=text", '{"text": "a"}\n{"text": \n', "{path} line 2 is not JSON: "),
        (
            "data=text",
            "".join(f'{{"text": "document {n}"}}\n' for n in range(20)),
            "objective=dpo needs preference pairs, but data.jsonl has none",
        ),
        ("data=preferences", "", "{path} is empty: it contains no record"),
        (
            "data=preferences",
            '{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "chosen": "a"}\n',
            "{path} line 2 has no field 'rejected'; its fields are prompt, chosen",
        ),
        (
            "data=preferences",
            '{"prompt": "p", "chosen": "a", "rejected": "a"}\n' * 3,
            "none of the 3 pairs in {path} is usable: 3 with chosen equal to rejected, 0 with an empty ",
        ),
    ],
)
def test_the_error_for_unusable_data_names_the_file_and_the_line(
    refuse: Refuse, tmp_path: Path, choice: str, lines: str, sentence: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(lines)
    assert refuse(choice, f"data.train={path}").startswith(sentence.replace("{path}", str(path)))


def checkpoint(directory: Path, width: int = 32) -> Path:
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    GPTNeoXForCausalLM(config).save_pretrained(directory)
    return directory


def compare(refuse: Refuse, before: Path, after: Path) -> str:
    return refuse("objective=none", "model=pair", f"model.before={before}", f"model.after={after}")


def test_the_error_for_checkpoints_of_two_shapes_names_the_parameter(refuse: Refuse, tmp_path: Path) -> None:
    error = compare(refuse, checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b", width=16))
    assert "of shape (64, 16) after and of shape (64, 32) before" in error
    assert error.endswith("more parameters differ: take two checkpoints of one architecture")


def test_the_error_for_missing_or_truncated_weights_names_the_file(refuse: Refuse, tmp_path: Path) -> None:
    good, bad = checkpoint(tmp_path / "good"), checkpoint(tmp_path / "bad")
    weights = bad / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert compare(refuse, good, bad).startswith(
        f"{weights} is truncated or corrupt; copy or download it again"
    )
    weights.unlink()
    assert compare(refuse, good, bad).startswith(
        f"no model.safetensors or model.safetensors.index.json in {bad}"
    )
    (bad / "config.json").unlink()
    assert compare(refuse, good, bad) == f"{bad} holds no config.json: give a transformers checkpoint"


def test_the_error_for_a_model_without_a_residual_map_names_the_file_to_add(
    refuse: Refuse, tmp_path: Path
) -> None:
    XGLMConfig(d_model=32, num_layers=1, attention_heads=2).save_pretrained(tmp_path / "xglm")
    message = refuse("model=pythia", f"model.name={tmp_path / 'xglm'}")
    assert message == (
        "no residual-stream map for 'xglm': "
        "add a function architecture(config) in weightgeom/architectures/xglm.py"
    )


@pytest.mark.parametrize("offline", ["1", "0"])
def test_a_hub_model_that_cannot_be_downloaded_gets_one_sentence(tmp_path: Path, offline: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    ended = run(
        tmp_path, "model=pythia", HF_HUB_OFFLINE=offline, HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / "hf")
    )
    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert line.startswith(
        "error: cannot get EleutherAI/pythia-70m@step143000 from the hub or its local cache ("
    )
    assert line.endswith("check the name, the revision and the network, or give a directory")


def test_the_whole_traceback_is_printed_on_demand_and_kept_next_to_the_record(tmp_path: Path) -> None:
    ended = run(tmp_path, "training.steps=0", HYDRA_FULL_ERROR="1")
    assert ended.code == 1
    assert "Traceback (most recent call last)" in ended.err
    assert "ValueError: training.steps should be greater than or equal to 1, got 0" in ended.err
    (kept,) = tmp_path.glob("outputs/jobs/*/*/traceback.txt")
    assert "Traceback (most recent call last)" in kept.read_text()


@pytest.fixture(scope="module")
def diverged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    home = tmp_path_factory.mktemp("diverged")
    return home, run(home, *BEHAVIOUR, *WORLD, "training.learning_rate=1e30")


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_its_last_good_checkpoint(
    diverged: tuple[Path, Ended],
) -> None:
    home, ended = diverged
    assert ended.code == 1 and "Traceback" not in ended.err
    (line,) = ended.errors
    assert (
        line.startswith("error: training diverged: ") and " at step 2; the last good checkpoint is " in line
    )
    good = Path(line.split("the last good checkpoint is ")[1].partition(";")[0])
    config = GPTNeoXConfig.from_pretrained(good)
    weights = open_params(good, architecture_of(config))
    assert all(bool(torch.isfinite(weights[name]).all()) for name in weights)
    assert GPTNeoXForCausalLM.from_pretrained(good).config.hidden_size == 32
    assert not done(home / "outputs", "training")
    assert len(done(home / "outputs", "pretraining")) == 1


def test_a_diverged_run_has_status_failed_in_its_record_and_in_mlflow(diverged: tuple[Path, Ended]) -> None:
    home, _ = diverged
    (record,) = home.glob("outputs/jobs/*/*/record")
    assert status(record)["status"] == "FAILED" and "training diverged" in status(record)["error"]
    assert "FloatingPointError" in (record.parent / "traceback.txt").read_text()
    client = MlflowClient(f"sqlite:///{home}/outputs/mlflow.db")
    experiment = client.get_experiment_by_name("scratch")
    assert experiment is not None
    (published,) = client.search_runs([experiment.experiment_id])
    assert published.info.status == "FAILED"
    assert "training diverged" in published.data.tags["error"]


def test_a_diverged_run_does_not_block_later_runs(diverged: tuple[Path, Ended]) -> None:
    home, _ = diverged
    ended = run(home, *BEHAVIOUR, *WORLD)
    assert ended.code == 0, ended.err
    assert "reusing" in ended.out
    (trained,) = done(home / "outputs", "training")
    assert json.loads((trained / "spec.json").read_text())["training"]["learning_rate"] < 1
    assert status(ended.record)["status"] == "FINISHED"


# In KiB: the disk fills up before Hydra writes the configuration, within the record, and within the base.
@pytest.mark.parametrize("room", [4, 32, 256])
def test_a_full_disk_is_reported_once(tmp_path: Path, room: int) -> None:
    with small_disk(tmp_path / "disk", room * 1024) as before:
        ended = run(tmp_path, *BEHAVIOUR, *WORLD, f"outputs={tmp_path / 'disk'}", before=before)
        assert not done(tmp_path / "disk", "pretraining")
    assert ended.code == 1
    assert "Traceback" not in ended.err + ended.out and "Error executing job" not in ended.err
    (line,) = ended.errors
    assert line.startswith("error: the disk is full: ")
    assert line.endswith("free space or set outputs= to another disk")


def test_a_log_file_on_a_full_disk_adds_no_traceback_to_the_error(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"document {n}" for n in range(20)))
    full = "hydra.job_logging.handlers.file.filename=/dev/full"
    ended = run(tmp_path, "data=text", "data.train=text.txt", full)
    assert "18 training and 2 held-out items" in ended.out
    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert line.startswith("error: objective=dpo needs preference pairs")


def test_a_run_whose_output_nobody_reads_any_more_ends_with_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "run.py"), "device=cpu"]
    with Popen(command, cwd=tmp_path, env=environment({}), stdout=PIPE, stderr=PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, err = process.communicate()
    assert process.returncode == 1
    sentence = "what this output was piped to has ended: without the pipe, the same command goes on from here"
    assert err == f"error: {sentence}\n"
