"""Plans of `plan=true` against the runs themselves; a plan leaves no files."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub
import pytest
from app import ROOT, SMALL, WORLD, Ended, environment, run
from configs import composed
from networks import save
from omegaconf import OmegaConf
from stored import fetched

from runners.compose import parts
from runners.planning.machine import Machine
from runners.planning.plan import Plan, PlannedStage, Planner
from runners.planning.printing import show, size
from runners.summary.durations import duration
from weightgeom.training.config import Training

PLAN = ["plan=true", *SMALL, *WORLD]
# Wide enough for the activations to count next to the libraries' memory, and quickly trained.
SHAPE = [
    *WORLD,
    *("model.pretraining.steps=4", "training.steps=4", "probe.rsf.tokens=1024", "probe.rsf.prompts=16"),
    "device=cpu",
]


def planner(tmp_path: Path, **options: Any) -> Planner:
    return Planner(tmp_path / "outputs", "cpu", **options)


def planned(made: Planner, *overrides: str) -> Plan:
    config = composed(*overrides)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return made.plan(parts(config), plain)


def by_name(plan: Plan) -> dict[str, PlannedStage]:
    return {stage.name: stage for stage in plan.stages.values()}


@pytest.mark.slow
def test_a_plan_predicts_the_memory_and_time_of_its_run(tmp_path: Path) -> None:
    script = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "sys.path[:0] = sys.argv[1:3]\n"
        "from test_plan import by_name, planned, planner\n"
        "plan = planned(planner(Path(sys.argv[3])), *sys.argv[4:])\n"
        "stages = by_name(plan).values()\n"
        "print(json.dumps([max(s.memory for s in stages), sum(s.seconds for s in stages)]))"
    )
    places = [str(ROOT / "tests/helpers"), str(ROOT / "tests/runners/planning"), str(tmp_path)]
    one_thread = environment({"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    command = [sys.executable, "-c", script, *places, *SHAPE]
    ended = subprocess.run(command, env=one_thread, capture_output=True, text=True, check=True)
    memory, seconds = map(float, re.findall(r"[\d.]+", ended.stdout.splitlines()[-1]))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *SHAPE],
        cwd=tmp_path,
        env=one_thread,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0
    assert memory == pytest.approx(1024 * usage.ru_maxrss, rel=0.25)
    # Processor time, which other processes stretch less than the clock's; within a factor of two when idle.
    assert 1 / 3 < seconds / (usage.ru_utime + usage.ru_stime) < 3


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    home = tmp_path_factory.mktemp("planned")
    return home, run(home, *PLAN)


@pytest.mark.slow
def test_a_plan_lists_every_stage_and_ends_with_fits_or_does_not_fit(default: tuple[Path, Ended]) -> None:
    _, ended = default
    assert ended.code == 0, ended.err
    stages = "pretraining rsf_pretraining behaviour_pretraining training rsf behaviour".split()
    assert all(re.search(rf"│ {stage} +│", ended.out) for stage in stages)
    assert "4 steps" in ended.out and "4 checkpoints" in ended.out
    assert re.fullmatch(r"fits: .* to download, .*; nothing was started", ended.out.splitlines()[-1])


@pytest.mark.slow
def test_a_plan_makes_no_directory_and_no_record(default: tuple[Path, Ended]) -> None:
    assert not list(default[0].iterdir())


@pytest.mark.slow
def test_the_plan_of_a_sweep_counts_shared_stages_once(tmp_path: Path) -> None:
    overrides = [override for override in PLAN if "rsf" not in override]
    ended = run(tmp_path, "-m", *overrides, "probe=[behaviour]", "seed=0,1")
    assert ended.code == 0, ended.err
    rows = {line.split("│")[1].strip(): line for line in ended.out.splitlines() if line.startswith("│")}
    times = {name: int(line.split("│")[-2]) for name, line in rows.items()}
    assert times["pretraining"] == 1 and times["training"] == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_plan_of_a_chain_compares_every_stage_with_the_base_and_with_the_previous_stage(
    tmp_path: Path,
) -> None:
    stages = {name: save("llama", tmp_path / name, seed) for seed, name in enumerate(("base", "sft", "dpo"))}
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"Document {n} tells of {n * n} things." for n in range(60))
    )
    plan = planned(
        planner(tmp_path),
        "model=chain/own",
        f"model.stages={{{', '.join(f'{name}: {place}' for name, place in stages.items())}}}",
        *("objective=none", "data=text", f"data.train={tmp_path}/text.txt", "probe=[rsf]"),
        *("probe.rsf.tokens=256", "device=cpu"),
    )
    assert len(plan.files) == 3
    names = [stage.name for stage in plan.stages.values()]
    assert (names.count("rsf"), names.count("rsf_stages")) == (1, 2)


@pytest.mark.slow
def test_a_plan_has_only_the_probes_of_each_objective(tmp_path: Path) -> None:
    swept = ["objective=dpo,ce", "+only.behaviour=[dpo]", "seed=0"]
    ended = run(tmp_path, *PLAN, *swept, "-m")
    assert ended.code == 0, ended.err
    rows = [line.split("│") for line in ended.out.splitlines() if line.startswith("│")]
    times = {row[1].strip(): int(row[-2]) for row in rows}
    assert (times["rsf"], times["behaviour"]) == (2, 1)


@pytest.mark.slow
def test_the_size_of_a_hub_checkpoint_is_planned_without_its_weights(tmp_path: Path) -> None:
    repository, text = "models/lab/one", tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"Document {n} tells of {n * n} things, and of nothing else." for n in range(80))
    )
    served = {"step512": save("gpt_neox", tmp_path / "step512")}
    (served["step512"] / "onnx").mkdir()
    (served["step512"] / "onnx" / "model.safetensors").write_bytes(b"the same again")
    (served["step512"] / "pytorch_model.bin").write_bytes(b"a pickle")
    taken = [
        path for path in served["step512"].iterdir() if path.suffix in (".safetensors", ".json", ".jinja")
    ]
    overrides = [
        *("plan=true", "device=cpu", "model=pythia", "model.name=lab/one", "model.revision=step512"),
        *("data=text", f"data.train={text}", "training.max_length=32", "training.steps=2"),
        *("objective=ce", "probe=[behaviour]", "probe.behaviour.tokens=256"),
    ]
    work = tmp_path / "work"
    work.mkdir()
    with hub.served({repository: served}) as server:
        at = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        first = run(work, *overrides, **at)
        resolved = [path for _, path, _ in server.requests if "/resolve/" in path]
        fetched(["lab/one@step512"], tmp_path, {"HF_ENDPOINT": server.url})
        second = run(work, *overrides, **at)
    offline = run(work, *overrides, **(at | {"HF_HUB_OFFLINE": "1"}))
    assert first.code == second.code == offline.code == 0, first.err + second.err + offline.err
    assert resolved and all(path.endswith("/config.json") for path in resolved)
    whole = sum(path.stat().st_size for path in taken)
    config = (served["step512"] / "config.json").stat().st_size
    row = [cell.strip() for cell in _row(first.out, "lab/one@step512")]
    assert row[1:] == [str(len(taken)), size(whole), f"1 files, {size(config)}", size(whole - config)]
    for ended in (second, offline):
        row = [cell.strip() for cell in _row(ended.out, "lab/one@step512")]
        assert row[1:] == [str(len(taken)), size(whole), f"{len(taken)} files, {size(whole)}", "-"]
    assert not list(work.iterdir())


def _row(out: str, name: str) -> list[str]:
    return next(line for line in out.splitlines() if name in line).split("│")[1:-1]


@pytest.mark.slow
def test_the_plan_of_a_model_that_the_hub_lacks_is_refused(tmp_path: Path) -> None:
    with hub.served({}) as server:
        at = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        ended = run(tmp_path, "plan=true", "model=pythia", "model.name=lab/two", "objective=ce", **at)
    assert ended.code == 1 and len(ended.errors) == 1
    assert "cannot get lab/two@step143000 from the hub or its local cache" in ended.errors[0]


@pytest.mark.parametrize(
    ("stage", "share", "overrides"),
    [
        ("pretraining", 0.6, ["objective=none", "probe=[behaviour]"]),
        ("training", 0.6, ["model.pretraining.batch_size=1", "training.batch_size=96", "probe=[behaviour]"]),
        ("rsf", 0.85, ["model.d_model=256", "model.pretraining.batch_size=1", "training.batch_size=1"]),
    ],
)
@pytest.mark.slow
def test_with_its_remedy_a_stage_fits(tmp_path: Path, stage: str, share: float, overrides: list[str]) -> None:
    overrides = ["device=cpu", *WORLD, *overrides]
    roomy = planner(tmp_path)
    whole = by_name(planned(roomy, *overrides))[stage].memory
    base = roomy.machine.baseline
    tight = planner(tmp_path, memory=base + share * (whole - base))
    tight.cache["machine"] = replace(roomy.machine, memory=tight.memory)
    plan = planned(tight, *overrides)
    (problem,) = [clause for clause in show([plan], tight) if clause.startswith(f"{stage} takes")]
    remedy = by_name(plan)[stage].remedy
    assert remedy and problem.endswith(f"are free: add {remedy}")
    problems = show([planned(tight, *overrides, *remedy.split())], tight)
    assert not [clause for clause in problems if clause.startswith(f"{stage} ")]


@pytest.mark.slow
def test_a_plan_counts_the_memory_of_all_processes_and_the_time_of_those_that_share_a_thread(
    tmp_path: Path,
) -> None:
    def stage(size: int, *more: str, **options: Any) -> tuple[PlannedStage, float]:
        made = planner(tmp_path, threads=1, **options)
        made.cache["machine"] = Machine(1e15, 1e8, 1e9, 1.0)
        plan = planned(made, "device=cpu", *WORLD, "probe=[]", f"training.batch_size={size}", *more)
        return by_name(plan)["training"], 4.0 * plan.parameters

    one_process, weights = stage(6)
    two, _ = stage(12, "training.processes=2")
    # A process trains on half of the batch, and DDP copies its gradients; the run is a process as well.
    assert two.memory == pytest.approx(1e8 + 2 * (one_process.memory + weights))
    assert two.work == "64 steps, 2 processes" and one_process.work == "64 steps"
    assert (
        1.3 * one_process.seconds < two.seconds < 3 * one_process.seconds
    )  # 2, but for the noise of two measurements
    apart, _ = stage(12, "training.processes=2", nodes=2)
    assert apart.memory == pytest.approx(1e8 + one_process.memory + weights)
    parts, _ = stage(12, "training.processes=2", "training.shard=true")
    assert parts.memory < two.memory


@pytest.mark.slow
def test_a_plan_that_does_not_fit_ends_with_one_sentence_and_exit_code_1(tmp_path: Path) -> None:
    # No disk has room for the checkpoints of 10^15 parameters; the plan makes none.
    sizes = "model.d_model=16384 model.heads=128 model.d_mlp=65536 model.layers=200".split()
    ended = run(tmp_path, "plan=true", *WORLD, *sizes, "objective=none", "probe=[]", "device=cpu")
    assert ended.code == 1 and len(ended.errors) == 1
    assert re.search(
        r"does not fit: pretraining takes [\d.]+ TB of memory where .* are free", ended.errors[0]
    )
    assert re.search(r"checkpoints take [\d.]+ TB and .* has .*: set outputs=", ended.errors[0])
    assert "does not fit: " in ended.out.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_plan_setting_other_than_true_or_false_is_refused(tmp_path: Path) -> None:
    ended = run(tmp_path, "plan=perhaps")
    assert ended.code == 1
    assert ended.errors == ["error: plan must be true or false, got 'perhaps'"]


@pytest.mark.slow
def test_a_sweep_over_plan_is_refused(tmp_path: Path) -> None:
    ended = run(tmp_path, "plan=true,false", "-m")
    assert ended.code == 1
    assert "plan applies to the whole sweep" in ended.errors[0]


def test_states_and_checkpoints_are_counted_as_they_are_saved() -> None:
    training = Training(steps=8, save_every=2, keep=2)
    # Steps 1, 2, 4 and 8, and step 0 for a random start; two states, and a third until the oldest is deleted.
    assert training.checkpoints_size(10.0, 10.0, from_random=False) == (40.0, 90.0)
    assert training.checkpoints_size(10.0, 10.0, from_random=True) == (50.0, 90.0)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "-"), (1234, "1.23 kB"), (5.1e6, "5.1 MB"), (2.3e10, "23 GB")]
)
def test_sizes_are_written_in_powers_of_ten(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(12.4, "12 s"), (150, "2 min"), (9000, "2.5 h")])
def test_durations_are_rounded_to_the_accuracy_of_a_plan(seconds: float, text: str) -> None:
    assert duration(seconds) == text
