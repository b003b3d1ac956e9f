"""The real client of the hub, against a hub on loopback and then against its own cache alone."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import hub
import pytest
from networks import save
from stored import OFFLINE, fetched

NAME, REPOSITORY = "lab/one", "models/lab/one"
LARGE = 21 * 2**20  # bytes: the client keeps what it got in pieces of 10 MiB, so that it has one at the half


@dataclass(frozen=True)
class Asked:
    """The answers to one process online, and to the next offline, with the same cache."""

    served: dict[str, Path]  # the directory behind each revision
    online: list[str]
    requests: list[tuple[str, str, str | None]]
    offline: list[str]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    home = tmp_path_factory.mktemp("hub")
    served = {name: save("gpt_neox", home / name, seed) for seed, name in enumerate(("main", "step512"))}
    served["large"] = home / "large"
    served["large"].mkdir()
    (served["large"] / "model.safetensors").write_bytes(os.urandom(LARGE))
    (served["step512"] / "modeling_evil.py").write_text("raise SystemExit")
    (served["step512"] / "pytorch_model.bin").write_bytes(b"a pickle")
    (served["step512"] / "onnx").mkdir()
    (served["step512"] / "onnx" / "model.safetensors").write_bytes(b"the same again")
    commit = hub.commit_of(REPOSITORY, "step512")
    names = [f"{NAME}@step512", f"{NAME}@large", f"{NAME}@step1", "lab/two@step512", "lab/gated@v1"]
    with hub.served({REPOSITORY: served}) as server:
        server.gated.add("models/lab/gated")
        server.broken.add(f"{hub.commit_of(REPOSITORY, 'large')}/model.safetensors")
        online = fetched(names, home, {"HF_ENDPOINT": server.url})
        requests = list(server.requests)
        names = [f"{NAME}@step512", f"{NAME}@{commit}", f"{NAME}@main"]
        offline = fetched(names, home, {"HF_ENDPOINT": server.url, **OFFLINE})
        assert server.requests == requests  # offline is offline
    return Asked(served, online, requests, offline)


def test_a_revision_is_downloaded_without_code_pickles_and_other_formats(asked: Asked) -> None:
    snapshot = Path(asked.online[0])
    assert snapshot.name == hub.commit_of(REPOSITORY, "step512")
    weights = asked.served["step512"] / "model.safetensors"
    assert (snapshot / "model.safetensors").read_bytes() == weights.read_bytes()
    assert {"config.json", "tokenizer.json"} <= {path.name for path in snapshot.iterdir()}
    assert not [*snapshot.rglob("*.py"), *snapshot.rglob("*.bin"), *snapshot.glob("onnx")]


def test_offline_the_cache_gives_it_by_branch_and_by_commit_and_nothing_else(asked: Asked) -> None:
    assert asked.offline[:2] == [asked.online[0]] * 2
    assert asked.offline[2].startswith(f"refused: cannot get {NAME}@main from the hub or its local cache (")


def test_a_broken_download_resumes_where_it_broke(asked: Asked) -> None:
    weights = Path(asked.online[1]) / "model.safetensors"
    assert weights.read_bytes() == (asked.served["large"] / "model.safetensors").read_bytes()
    (resumed,) = [given for _, path, given in asked.requests if "/resolve/" in path and given]
    assert resumed == f"bytes={10 * 2**20}-"


def test_the_check_of_a_chain_downloads_only_configs(tmp_path: Path) -> None:
    stages = {f"models/lab/{name}": {"v1": save("llama", tmp_path / name)} for name in ("base", "sft")}
    program = (
        "from weightgeom.bases.chain import Chain\n"
        "chain = Chain({'base': 'lab/base@v1', 'sft': 'lab/sft'}, {'sft': 'v1'})\n"
        "print(chain.check(None).n_layers)"
    )
    with hub.served(stages) as server:
        home = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": server.url}
        command = [sys.executable, "-c", program]
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        ended = subprocess.run(command, env={**clean, **home}, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "2"
    files = {path.rpartition("/")[2] for _, path, _ in server.requests if "/resolve/" in path}
    assert "config.json" in files and all(name.endswith(".json") for name in files)


def test_a_checkpoint_missing_on_the_hub_is_refused_by_name(asked: Asked) -> None:
    revision, repository, gated = asked.online[2:]
    assert gated.startswith("refused: lab/gated is gated: accept its licence at https://huggingface.co/lab/")
    assert revision.startswith(f"refused: cannot get {NAME}@step1 from the hub or its local cache (")
    assert revision.endswith(
        f": the hub has the revisions main, step512, large; write {NAME}@REVISION with one that exists"
    )
    assert repository.startswith("refused: cannot get lab/two@step512 from the hub or its local cache (")
    assert repository.endswith("check the name, the revision and the network, or give a directory")


def test_of_many_revisions_the_nearest_are_listed(tmp_path: Path) -> None:
    steps = {f"step{number}000": tmp_path for number in range(1, 20)}
    with hub.served({REPOSITORY: {**steps, "main": tmp_path}}) as server:
        (message,) = fetched([f"{NAME}@step_3000"], tmp_path, {"HF_ENDPOINT": server.url})
    listed = message.partition("the hub has the revisions ")[2].partition(" and ")[0].split(", ")
    assert listed[0] in ("step3000", "step13000") and len(listed) == 12 and "main" not in listed
    assert message.endswith(f" and 8 others; write {NAME}@REVISION with one that exists")
