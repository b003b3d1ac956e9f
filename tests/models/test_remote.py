"""Remote safetensors files against safetensors' own reader of the same files."""

import json
import re
import socket
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranges
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from weightgeom.models import byte_ranges
from weightgeom.models.byte_ranges import fetched, listed, probed, traffic, without_secrets
from weightgeom.models.remote import (
    AT_ONCE,
    RemoteTensors,
    _recent,
    recent,
    remote_file,
    remote_tensors,
    stand_in,
)
from weightgeom.models.weights import opened

SHAPE = (384, 96)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_ranges, "WAITS", (0.001,) * 6)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of tensors of several dtypes and shapes, one of them empty and one a scalar."""
    torch.manual_seed(0)
    tensors = {
        "half": torch.randn(SHAPE).bfloat16(),
        "single": torch.randn(SHAPE),
        "codes": torch.randint(0, 255, (7, 3), dtype=torch.uint8),
        "eight": torch.randn(5, 5).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def remote(files: ranges.Files, name: str = "model.safetensors") -> "RemoteTensors":
    at_url = probed(f"{files.url}/{name}")
    assert at_url is not None
    return remote_tensors(at_url)


def assert_same(tensors: RemoteTensors, path: Path) -> None:
    with safe_open(path, "pt") as local:
        assert set(tensors) == set(local.keys()) and len(tensors) == len(local.keys())
        for name in tensors:
            part, remote_part = local.get_slice(name), tensors.get_slice(name)
            assert remote_part.get_shape() == part.get_shape()
            assert remote_part.get_dtype() == part.get_dtype()
            here, there = local.get_tensor(name), tensors.get_tensor(name)
            assert there.dtype == here.dtype and there.shape == here.shape
            assert there.reshape(-1).view(torch.uint8).equal(here.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("piece", [2**23, 20_000])
def test_every_tensor_has_the_bits_and_the_alignment_that_it_has_on_disk(
    file: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_ranges, "PIECE", piece)
    with ranges.served(file.parent) as files:
        tensors = remote(files)
        assert_same(tensors, file)
        for name, entry in tensors.entries.items():
            assert not entry.stop - entry.start or tensors[name].data_ptr() % 64 == entry.start % 64


def test_the_header_is_read_once_and_then_the_bytes_of_the_tensors_alone(file: Path) -> None:
    before = traffic()
    with ranges.served(file.parent) as files:
        header = 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
        remote(files)
        first = files.sent["model.safetensors"]
        assert header < first <= header + 9  # the probe's byte, and the scalar that a type check reads
        assert tuple(remote(files).get_slice("half").get_shape()) == SHAPE
        assert files.sent["model.safetensors"] == first + 1
        assert "half" in remote(files) and "other" not in remote(files)
        assert remote(files)["half"].nbytes == 2 * SHAPE[0] * SHAPE[1]
        sent = files.sent["model.safetensors"]
        assert sent == first + 4 + 2 * SHAPE[0] * SHAPE[1]
        assert traffic().since(before) == (sent, len(files.requests), 0)


def test_pieces_of_one_tensor_are_in_flight_together(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_ranges, "PIECE", 10_000)
    with ranges.served(file.parent) as files:
        tensors = remote(files)
        files.together = 4  # no answer before four requests wait
        tensors["half"]
        assert files.most >= 4


@pytest.mark.parametrize("seed", range(2))
def test_the_bits_are_the_same_after_ten_connections_were_cut(
    file: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_ranges, "PIECE", 10_000)
    before = traffic()
    with ranges.served(file.parent, seed=seed) as files:
        tensors = remote(files)
        files.cuts = 10
        assert_same(tensors, file)
        assert files.cuts == 0
    assert traffic().since(before).repeated == 10


def test_a_request_goes_on_behind_the_last_byte_that_arrived(file: Path) -> None:
    with ranges.served(file.parent) as files:
        tensors = remote(files)
        files.cuts, files.chance, entry = 3, 1.0, tensors.entries["half"]
        before, requests = files.sent["model.safetensors"], len(files.requests)
        tensors["half"]
        asked = [re.fullmatch(r"bytes=(\d+)-(\d+)", given or "") for _, given, _ in files.requests[requests:]]
        starts = [int(match[1]) for match in asked if match]
        assert len(starts) == 4 and starts == sorted(starts) and starts[0] == entry.start
        assert {int(match[2]) for match in asked if match} == {entry.stop - 1}
        # urllib3 may drop the tail of what arrived before a cut, never more than a read
        extra = files.sent["model.safetensors"] - before - (entry.stop - entry.start)
        assert 0 <= extra <= 3 * byte_ranges.PROGRESS


def test_a_busy_server_is_asked_again(file: Path) -> None:
    with ranges.served(file.parent, busy=3) as files:
        assert_same(remote(files), file)
    with ranges.served(file.parent) as files:
        tensors = remote(files)
        recent(tensors.file).forget()
        files.busy = 100
        with pytest.raises(ConnectionError, match=r"7 requests in a row failed, the last as HTTP 503; check"):
            tensors["half"]


def test_a_body_that_is_always_cut_is_refused_in_a_sentence(file: Path) -> None:
    with ranges.served(file.parent) as files:
        tensors = remote(files)
        recent(tensors.file).forget()
        files.short = {"model.safetensors"}
        with pytest.raises(ConnectionError, match=rf"cannot read {files.url}/model.safetensors: 7 requests"):
            tensors["scalar"]


def elsewhere(url: str) -> str:
    """A URL whose port nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return re.sub(r":\d+/", f":{closed.getsockname()[1]}/", url)


def test_a_server_that_is_gone_is_named(file: Path) -> None:
    with ranges.served(file.parent) as files:
        tensors = remote(files)
    tensors = replace(tensors, file=replace(tensors.file, url=elsewhere(tensors.file.url)))
    with pytest.raises(ConnectionError, match=r"requests in a row failed, the last as .*; check"):
        tensors["scalar"]


def test_a_server_without_ranges_is_refused_before_it_sends_the_file(file: Path) -> None:
    with ranges.served(file.parent, ranges=False) as files:
        with pytest.raises(ValueError, match=r"does not serve ranges of bytes: add \+\+model.cache=true, wh"):
            probed(f"{files.url}/model.safetensors")
        at_url = probed(f"{files.url}/model.safetensors", ranges=False)
        assert at_url is not None and at_url.size == file.stat().st_size


def test_a_missing_file_is_none_and_one_that_vanishes_is_named(file: Path) -> None:
    with ranges.served(file.parent) as files:
        assert probed(f"{files.url}/other.safetensors") is None
        tensors = remote(files)
        file.unlink()
        with pytest.raises(FileNotFoundError, match=r"there is no http://.*/model.safetensors \(HTTP 404\)"):
            tensors["half"]


def test_a_file_that_changes_while_it_is_read_is_refused(file: Path) -> None:
    with ranges.served(file.parent) as files:
        tensors = remote(files)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"has changed since this run began \(ETag .* instead of .*\)"):
            tensors["half"]
    with ranges.served(file.parent, etags=False) as files:
        tensors = remote(files)
        file.write_bytes(content + b"0")
        with pytest.raises(ValueError, match=r"has another length than before: bytes .* were asked for"):
            tensors["half"]


def header(path: Path, change: Any) -> None:
    """Rewrite the header of a file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    made = json.loads(content[8 : 8 + length])
    other = change(made)
    text = json.dumps(other if isinstance(other, list) else made).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content[:-5], r"its header describes \d+ bytes and the server has \d+"),
        (lambda content: content + b"0", r"its header describes \d+ bytes and the server has \d+"),
        (lambda content: content[:3], "it has 3 bytes"),
        (
            lambda content: b"\xff" * 8 + content[8:],
            "it names a header of 18446744073709551615 bytes in a file",
        ),
        (lambda content: content[:8] + b"?" + content[9:], "its header is not a JSON object of tensors"),
    ],
)
def test_a_damaged_file_is_refused_by_its_header(file: Path, change: Any, reason: str) -> None:
    file.write_bytes(change(file.read_bytes()))
    with (
        ranges.served(file.parent) as files,
        pytest.raises(ValueError, match=f"truncated or corrupt: {reason}"),
    ):
        remote(files)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda made: made["half"].update(shape=[1, 2]), r"a tensor of shape \(1, 2\) in BF16 has \d+ bytes"),
        (lambda made: made["half"].update(dtype="F4"), "the dtype F4 is not read over a network"),
        (lambda made: made["half"].update(shape=[-1]), "its header is not a JSON object of tensors"),
        (lambda made: made.pop("half"), "do not follow those of the tensor before it"),
        (lambda made: ["half"], "its header is not a JSON object of tensors"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(file: Path, change: Any, reason: str) -> None:
    header(file, change)
    with ranges.served(file.parent) as files, pytest.raises(ValueError, match=reason):
        remote(files)


def test_only_a_path_that_this_process_made_a_stand_in_is_read_from_a_url(file: Path, tmp_path: Path) -> None:
    with ranges.served(file.parent) as files:
        at_url = probed(f"{files.url}/model.safetensors?token=geheim")
        assert at_url is not None
        stand_in(tmp_path / "a" / "model.safetensors", at_url)
        assert remote_file(tmp_path / "a" / "model.safetensors") == at_url
        assert isinstance(opened(tmp_path / "a" / "model.safetensors"), RemoteTensors)
        assert "geheim" not in (tmp_path / "a" / "model.safetensors").read_text()
        (tmp_path / "b.safetensors").write_bytes((tmp_path / "a" / "model.safetensors").read_bytes())
        with pytest.raises(ValueError, match="is truncated or corrupt"):
            opened(tmp_path / "b.safetensors")


def test_no_error_shows_a_password_or_a_query(file: Path) -> None:
    assert without_secrets("https://me:pw@host:8/a/b?X-Amz-Signature=1#c") == "https://host:8/a/b"
    with ranges.served(file.parent) as files:
        at_url = probed(f"{files.url.replace('//', '//me:geheim@')}/model.safetensors?sig=verborgen")
        assert at_url is not None
    with pytest.raises(ConnectionError) as raised:
        fetched(replace(at_url, url=elsewhere(at_url.url)), 0, 8)
    chain, error = "", raised.value
    while error is not None:
        chain += str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert "geheim" not in chain + at_url.description and "verborgen" not in chain + at_url.description


def test_a_store_of_fsspec_gives_the_same_bits(file: Path) -> None:
    with ranges.bucket() as store:
        store.pipe("s3://bucket/run/model.safetensors", file.read_bytes())
        (at_url,) = listed("s3://bucket/run").values()
        assert at_url.size == file.stat().st_size and at_url.version
        assert_same(remote_tensors(at_url), file)
        with pytest.raises(FileNotFoundError, match="there is no s3://bucket/other: check the URL"):
            listed("s3://bucket/other")


def test_a_store_whose_package_is_missing_is_named_with_the_thing_to_install() -> None:
    try:
        import gcsfs  # noqa: F401 # pyright: ignore
    except ImportError:
        with pytest.raises(
            ValueError, match=r"gs:// needs the package gcsfs: pip install 'weightgeom\[gs\]'"
        ):
            listed("gs://bucket/run")


def test_of_many_checkpoints_only_the_last_are_kept(tmp_path: Path, file: Path) -> None:
    for number in range(AT_ONCE + 2):
        place = tmp_path / "chain" / str(number)
        place.mkdir(parents=True)
        (place / file.name).write_bytes(file.read_bytes())
    with ranges.served(tmp_path / "chain") as files:
        tensors = [remote(files, f"{number}/{file.name}") for number in range(AT_ONCE + 2)]
        for checkpoint in tensors:
            assert checkpoint["half"] is not None
        sizes = [len(_recent[checkpoint.file.url.rpartition("/")[0]].kept) for checkpoint in tensors]
    assert sizes[:2] == [0, 0] and all(sizes[2:])
