"""Checkpoints at a URL against the same checkpoints on disk."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import app
import hub
import pandas as pd
import pytest
import ranges
from huggingface_hub import constants
from llamas import TEXTS, llama, saved
from safetensors.torch import load_file, save_file

import weightgeom as wg
from weightgeom.bases import remote
from weightgeom.bases.chain import Chain
from weightgeom.bases.hub import checkpoint_files, fetch, identity
from weightgeom.bases.pretrained import Pretrained, TwoCheckpoints
from weightgeom.bases.remote import remote_checkpoint, temporary_directories
from weightgeom.models import byte_ranges
from weightgeom.models.byte_ranges import traffic
from weightgeom.models.loading import load_network
from weightgeom.probes.behaviour import Behaviour
from weightgeom.probes.rsf import RSF
from weightgeom.probes.spectrum import Spectrum
from weightgeom.training.fit import outdated_name_allowed

PROBES = [RSF(k=4, tokens=512), Spectrum(tokens=512), Behaviour(tokens=512)]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, the second in shards."""
    place = tmp_path_factory.mktemp("pair")
    saved(llama(0), place / "before")
    saved(llama(1), place / "after")
    shards(place / "after")
    (place / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return place


def shards(directory: Path) -> None:
    """Put the weights of a checkpoint into two shards, one of them in a folder."""
    held = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    (directory / "inner").mkdir()
    names = ("model-1.safetensors", "inner/model-2.safetensors")
    files = {key: names[index % 2] for index, key in enumerate(held)}
    for name in names:
        save_file({key: held[key] for key in held if files[key] == name}, directory / name)
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.fixture(autouse=True)
def removed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No waits, and no directory that another test has opened."""
    monkeypatch.setattr(byte_ranges, "WAITS", (0.001,) * 6)
    with temporary_directories():
        yield


def measured(before: object, after: object) -> pd.DataFrame:
    return wg.measure(str(before), str(after), texts=TEXTS, probes=PROBES, seed=3, device="cpu")


@pytest.fixture(scope="module")
def table(place: Path) -> pd.DataFrame:
    """The comparison on disk."""
    return measured(place / "before", place / "after")


@pytest.mark.parametrize("cuts", [0, 10])
def test_the_table_of_a_remote_pair_is_that_of_the_files_to_the_bit(
    place: Path, table: pd.DataFrame, cuts: int
) -> None:
    before = traffic()
    with ranges.served(place) as files:
        pair = [f"{files.url}/before", f"{files.url}/after"]
        for location in pair:
            remote_checkpoint(location)
        files.cuts = cuts
        pd.testing.assert_frame_equal(measured(*pair), table, check_exact=True)
        assert files.cuts == 0
    assert traffic().since(before).repeated == cuts


def without_checks_of_types(source: str, *arguments: object) -> Any:
    """The JSON that a script prints. It runs without the type checks of the tests, which read tensors."""
    paths = f"{app.ROOT}:{app.ROOT / 'tests/helpers'}"
    ended = subprocess.run(
        [sys.executable, "-c", source, *map(str, arguments)],
        env=app.environment({"PYTHONPATH": paths}),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


COUNTING = """
import json, sys
from collections import Counter
from pathlib import Path
import ranges
from llamas import TEXTS
import weightgeom as wg
from weightgeom.models import weights
from weightgeom.models.byte_ranges import traffic
from weightgeom.probes.rsf import RSF

place, read, real = Path(sys.argv[1]), Counter(), weights.opened

class Counted:
    def __init__(self, path):
        self.path, self.file = path, real(path)
    def __getattr__(self, name):
        return getattr(self.file, name)
    def get_tensor(self, key):
        tensor = self.file.get_tensor(key)
        read[str(self.path.relative_to(place))] += tensor.nbytes
        return tensor

def measured(before, after):
    wg.measure(str(before), str(after), texts=TEXTS, probes=[RSF(k=4, tokens=512)], device="cpu")

weights.opened = Counted
measured(place / "before", place / "after")
weights.opened = real
before = traffic()
with ranges.served(place) as files:
    measured(f"{files.url}/before", f"{files.url}/after")
    spent = traffic().since(before)
    print(json.dumps([read, files.sent, [spent.bytes, spent.requests], len(files.requests)]))
"""


def test_every_tensor_of_a_small_pair_is_fetched_once(place: Path) -> None:
    read, sent, spent, requests = without_checks_of_types(COUNTING, place)
    assert len(read) == 3
    for name, size in read.items():
        header = 8 + int.from_bytes((place / name).read_bytes()[:8], "little")
        whole = (place / name).stat().st_size
        assert sent[name] == whole + 1 < size + header, name  # and a byte that tells the length
    assert spent == [sum(sent.values()), requests]


WALKING = """
import json, sys
from collections import Counter
from pathlib import Path
import ranges
from llamas import TEXTS
import weightgeom as wg
from weightgeom.estimators import moments
from weightgeom.models import remote
from weightgeom.probes.rsf import RSF

moments.SUMS = 1.0  # a site at a time, as of wide models
place, fetched, real = Path(sys.argv[1]), Counter(), remote.Recent.get

def get(self, key, fetch):
    def counted():
        file, name = key
        fetched[file.url, name] += 1
        return fetch()
    return real(self, key, counted)

remote.Recent.get, remote.SMALL = get, 0
with ranges.served(place) as files:
    pair = f"{files.url}/before", f"{files.url}/after"
    wg.measure(*pair, texts=TEXTS, probes=[RSF(k=4, tokens=512)], device="cpu")
    recent = [remote._recent[place] for place in pair]
    print(json.dumps([list(fetched.items()), [each.room for each in recent], len(recent[1].kept)]))
"""


def test_a_walk_keeps_no_more_than_a_layer_and_fetches_each_of_its_tensors_once(tmp_path: Path) -> None:
    for seed, name in enumerate(("before", "after")):
        saved(llama(seed, layers=6), tmp_path / name)
    fetched, rooms, kept_after = without_checks_of_types(WALKING, tmp_path)
    layers = {tuple(key): count for key, count in fetched if ".layers." in key[1]}
    assert len(layers) == 2 * 6 * 9
    again = {key for key, count in layers.items() if count > 1}
    # The first matrix is compared in front of the walk, to see whether anything has moved; norms are listed
    # behind it, among the parameters outside of the map.
    print(again)
    assert all(("q_proj" in name and ".0." in name) or "norm" in name for _, name in again)
    layer = sum(
        weight.nbytes for name, weight in load_file(tmp_path / "after" / WEIGHTS).items() if ".0." in name
    )
    assert rooms == [layer * 5 // 4, 0] and kept_after == 1


def test_nothing_but_small_files_is_written_and_they_are_removed(place: Path) -> None:
    with ranges.served(place) as files, temporary_directories():
        directory = remote_checkpoint(f"{files.url}/after")
        stored = {path.name: path.stat().st_size for path in directory.rglob("*") if path.is_file()}
        assert {"config.json", "tokenizer.json", "model-1.safetensors", "model-2.safetensors"} <= set(stored)
        assert stored["model-1.safetensors"] < 300 and directory.parts[-1] == "after"
        assert fetch(f"{files.url}/after") == directory  # asked for once
        root = directory.parents[len(directory.parts) - len(Path(tempfile.gettempdir()).resolve().parts) - 2]
        assert root.name.startswith("weightgeom-")
    assert not root.exists()


def test_the_identity_is_that_of_the_version_at_the_server(place: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(place / "before", tmp_path / "before")

    def asked(query: str = "") -> str:
        with temporary_directories():
            return identity(fetch(f"{files.url}/before{query}"))

    with ranges.served(tmp_path) as files:
        first = asked()
        assert asked("?signature=1") == asked("?signature=2") == first
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"note": 1}))
        assert (second := asked()) != first
        content = bytearray((copy / WEIGHTS).read_bytes())
        content[-1] ^= 1
        (copy / WEIGHTS).write_bytes(content)
        assert asked() != second


CHECKING = """
import json, sys
from pathlib import Path
import ranges
from weightgeom.bases.chain import Chain
from weightgeom.bases.pretrained import TwoCheckpoints
from weightgeom.models.byte_ranges import traffic

with ranges.served(Path(sys.argv[1])) as files:
    first, second = f"{files.url}/before", f"{files.url}/after"
    layers = TwoCheckpoints(first, second).check(None).n_layers
    print(json.dumps([layers, Chain({"base": first, "dpo": second}).check(None).n_layers, traffic().bytes]))
"""


def test_a_pair_and_a_chain_of_urls_pass_their_checks_by_headers_alone(place: Path) -> None:
    *layers, fetched = without_checks_of_types(CHECKING, place)
    small = sum(path.stat().st_size for path in place.rglob("*") if path.suffix != ".safetensors")
    assert layers == [2, 2] and fetched < 2 * small  # headers, and each small file once


def test_what_a_url_of_a_checkpoint_does_not_go_with_is_named(place: Path) -> None:
    with ranges.served(place) as files:
        first = f"{files.url}/before"
        assert Pretrained(first, revision="step1").locations() == {0: first}
        with pytest.raises(ValueError, match=r"is the URL of one checkpoint: leave out model\.revisions"):
            Pretrained(first, revisions=["a", "b"]).locations()


def test_a_plan_knows_the_bytes_without_reading_them(place: Path) -> None:
    with ranges.served(place) as files:
        planned = checkpoint_files(f"{files.url}/after")
        sizes = {path.name: path.stat().st_size for path in (place / "after").rglob("*") if path.is_file()}
        assert planned.streamed and planned.missing == 0 and planned.size == sum(sizes.values())
        assert planned.weights == sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
        kept = checkpoint_files(f"{files.url}/after", cache=True)
        assert not kept.streamed and kept.missing == planned.size
        assert files.sent["after/model-1.safetensors"] <= 2  # a byte for each plan


def test_a_training_starts_from_the_weights_at_a_url(place: Path) -> None:
    with ranges.served(place) as files:
        network = load_network(fetch(f"{files.url}/after"))
    expected = load_network(place / "after")
    assert all(network.state_dict()[name].equal(weight) for name, weight in expected.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_store_gives_the_same_table(place: Path, table: pd.DataFrame) -> None:
    with ranges.bucket() as store:
        for path in (path for path in place.rglob("*") if path.is_file()):
            if "inner" not in path.parts:  # a store lists a directory, not the folders in it
                store.pipe(f"s3://bucket/{path.relative_to(place)}", path.read_bytes())
        saved(llama(1), place / "whole")
        store.pipe(f"s3://bucket/after/{WEIGHTS}", (place / "whole" / WEIGHTS).read_bytes())
        for name in (f"{WEIGHTS}.index.json", "model-1.safetensors"):
            store.rm(f"s3://bucket/after/{name}")
        remote_table = measured("s3://bucket/before", "s3://bucket/after")
        with pytest.raises(FileNotFoundError, match="there is no s3://bucket/else: check the URL"):
            fetch("s3://bucket/else")
    pd.testing.assert_frame_equal(remote_table, table, check_exact=True)


def test_a_checkpoint_of_the_hub_is_read_by_its_commit(
    place: Path, table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    repositories = {f"models/lab/{name}": {"v1": place / name} for name in ("before", "after")}
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, "{server}")
    with hub.served(repositories) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace("{server}", server.url)
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        pd.testing.assert_frame_equal(measured("hf://lab/before@v1", "hf://lab/after@v1"), table)
        commit = hub.commit_of("models/lab/after", "v1")
        assert Pretrained("hf://lab/after", revision=commit).locations() == {0: f"hf://lab/after@{commit}"}
        assert Pretrained("hf://lab/after@v1").locations() == {0: "hf://lab/after@v1"}
        with pytest.raises(ValueError, match="hf://lab/after is not pinned"):
            Pretrained("hf://lab/after").locations()
        with pytest.raises(ValueError, match="is neither a directory nor a pinned hub name"):
            Chain({"base": "hf://lab/before", "dpo": "hf://lab/after@v1"}).locations()
        with pytest.raises(FileNotFoundError, match=r"the hub does not give hf://lab/after@v2 \(.*\): check"):
            fetch("hf://lab/after@v2")
        tensors = [path for _, path, given in server.requests if given and "safetensors" in path]
        assert tensors and all(
            hub.commit_of(f"models/lab/{path.split('/')[2]}", "v1") in path for path in tensors
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(
            FileNotFoundError, match="HF_HUB_OFFLINE=1 forbids it: unset that, or write lab/x@v1"
        ):
            fetch("hf://lab/x@v1")


def test_with_cache_it_is_downloaded_once_and_is_an_ordinary_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    with ranges.served(place, ranges=False, cuts=3) as files:
        location = f"{files.url}/before"
        with pytest.raises(ValueError, match=r"does not serve ranges of bytes: add \+\+model.cache=true"):
            fetch(location)
        directory = fetch(location, cache=True)
        sent = files.sent[f"before/{WEIGHTS}"]
        assert fetch(location, cache=True) == directory and directory.parent == tmp_path / "weightgeom"
        size = (place / "before" / WEIGHTS).stat().st_size
        assert files.sent[f"before/{WEIGHTS}"] - sent <= size  # the answer to a probe, which is not read
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]
    assert identity(directory) == identity(place / "before")
    assert (directory / WEIGHTS).read_bytes() == (place / "before" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("location", "refusal"),
    [
        (
            "{url}/nowhere",
            "nowhere holds no config.json: give the URL of a transformers checkpoint's directory",
        ),
        ("{url}/before/model.safetensors", "is a file: give the URL of its directory, {url}/before"),
        ("{url}/model.gguf", "model.gguf is not safetensors, the one format that is read over a network"),
        ("{url}/bare", "bare holds no model.safetensors or model.safetensors.index.json"),
        ("hf://lab", "hf://lab is not a hub repository: write hf://NAME/MODEL@REVISION"),
    ],
)
def test_a_url_that_is_no_checkpoint_is_refused(place: Path, location: str, refusal: str) -> None:
    (place / "bare").mkdir(exist_ok=True)
    shutil.copyfile(place / "before" / "config.json", place / "bare" / "config.json")
    with ranges.served(place) as files:
        with pytest.raises((FileNotFoundError, ValueError)) as raised:
            fetch(location.format(url=files.url))
        assert refusal.format(url=files.url) in str(raised.value)


def test_a_page_of_the_hub_is_answered_with_its_location() -> None:
    message = remote._without_config("https://huggingface.co/lab/m/tree/v1")
    assert message == "https://huggingface.co/lab/m/tree/v1 is a page of the hub: write hf://lab/m@v1"


def test_pickles_and_code_are_not_taken_from_a_url() -> None:
    for options, key in (({"bin": True}, "allow_bin"), ({"code": True}, "trust_remote_code")):
        with pytest.raises(ValueError, match=f"neither pickled weights nor code: leave out model.{key}"):
            fetch("https://localhost/checkpoint", **options)


@pytest.mark.parametrize("shard", ["../before/model.safetensors", "/etc/x.safetensors", "https://evil/../x"])
def test_an_index_does_not_lead_outside_its_checkpoint(place: Path, tmp_path: Path, shard: str) -> None:
    copy = shutil.copytree(place / "after", tmp_path / "after")
    index = json.loads((copy / f"{WEIGHTS}.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = shard
    (copy / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with ranges.served(tmp_path) as files:
        with pytest.raises(ValueError, match="which lies outside"):
            TwoCheckpoints(f"{files.url}/after", f"{files.url}/after").check(None)
        asked = {path for path, _, _ in files.requests}
        assert all(path.startswith("/after/") and ".." not in path for path in asked)


def test_a_missing_shard_is_named(place: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(place / "after", tmp_path / "after")
    (copy / "model-1.safetensors").unlink()
    with (
        ranges.served(tmp_path) as files,
        pytest.raises(FileNotFoundError, match=r"names model-1\.safetensors"),
    ):
        TwoCheckpoints(f"{files.url}/after", f"{files.url}/after").check(None)


def test_an_adapter_at_a_url_is_an_update_of_its_base(place: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    with outdated_name_allowed():
        adapted = get_peft_model(
            llama(0), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
        )
    adapted.save_pretrained(str(tmp_path / "adapter"))
    with ranges.served(tmp_path) as files:
        table = measured(place / "before", f"{files.url}/adapter")
    pd.testing.assert_frame_equal(table, measured(place / "before", tmp_path / "adapter"), check_exact=True)


@pytest.mark.slow
def test_a_run_on_urls_reports_its_bytes_and_leaves_none_of_them_on_disk(place: Path, tmp_path: Path) -> None:
    def run(outputs: str, *pair: object, **variables: str) -> app.Ended:
        given = [f"model.before={pair[0]}", f"model.after={pair[1]}", f"outputs={outputs}", "device=cpu"]
        text = [f"data.train={place / 'text.jsonl'}"]
        probes = ["probe=[rsf]", "probe.rsf.k=4", "probe.rsf.tokens=512"]
        return app.fresh_run(
            tmp_path, "objective=none", "model=pair", "data=text", *given, *text, *probes, **variables
        )

    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    clean = {"HF_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "HF_HUB_OFFLINE": ""}
    with ranges.served(place) as files:
        urls = [
            f"{files.url.replace('//', '//me:geheim@')}/{name}?sig=verborgen" for name in ("before", "after")
        ]
        ended = run("remote", *(f"'{url}'" for url in urls), **clean)
        assert ended.code == 0, ended.err
        sent, requests = files.sent.total(), len(files.requests)
    assert f"fetched: {sent:,} bytes of remote checkpoints, by {requests:,} requests and 0 repet" in ended.out
    tags = json.loads((ended.record / "run.json").read_text())["tags"]
    assert (tags["fetched_bytes"], tags["fetched_requests"], tags["fetched_repeated"]) == (
        str(sent),
        str(requests),
        "0",
    )
    local = run("local", place / "before", place / "after")
    assert local.code == 0, local.err
    fetched, read = (wg.read_run(record).tables["rsf"] for record in (ended.record, local.record))
    pd.testing.assert_frame_equal(fetched, read, check_exact=True)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in left if path.suffix == ".safetensors" or path.name == "tokenizer.json"]
    assert not list((tmp_path / "tmp").iterdir()) and not list((tmp_path / "home").rglob("*.safetensors"))
    written = b"".join(path.read_bytes() for path in left) + (ended.out + ended.err).encode()
    assert b"geheim" not in written and b"verborgen" not in written
