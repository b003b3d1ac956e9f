"""Checkpoints at a URL: their small files in a temporary directory, their weights left where they are."""

import atexit
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from urllib.parse import quote, urlsplit

from weightgeom.models.adapters import CONFIG, WEIGHTS
from weightgeom.models.byte_ranges import RemoteFile, download, listed, probed, whole, without_secrets
from weightgeom.models.json_files import LARGEST, json_object
from weightgeom.models.pickled import OTHER_FILES
from weightgeom.models.remote import forget, remote_file, stand_in
from weightgeom.text.files import first_line

log = logging.getLogger(__name__)
REMOTE = re.compile(r"(hf|https?|s3|gs)://.+")
HUB_NAME = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>.+))?")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The small files of a checkpoint, which a web server need not list.
SMALL = (
    "config.json generation_config.json adapter_config.json tokenizer.json tokenizer_config.json"
    " special_tokens_map.json added_tokens.json vocab.json merges.txt vocab.txt tokenizer.model spiece.model"
    " sentencepiece.bpe.model chat_template.jinja chat_template.json"
).split()
AT_ONCE = 8  # small files


def is_remote(location: str) -> bool:
    """Whether a location is a URL rather than a directory or a hub name."""
    return REMOTE.fullmatch(location) is not None


def hub_name(location: str) -> str:
    """The hub's `name@revision` of an `hf://` location; empty for other URLs.

    Raises:
        ValueError: if it is malformed.
    """
    if not location.startswith("hf://"):
        return ""
    if HUB_NAME.fullmatch(location) is None:
        raise ValueError(f"{location} is not a hub repository: write hf://NAME/MODEL@REVISION")
    return location.removeprefix("hf://")


@dataclass
class _Temporary:
    """The directories of the remote checkpoints that a process has opened, by location."""

    process: int = 0
    root: Path | None = None
    directories: dict[tuple[str, bool], Path] = field(default_factory=dict)

    def known(self, location: str, ranges: bool) -> Path | None:
        """The directory of a location that this process has opened."""
        return self.directories.get((location, ranges)) if self.process == os.getpid() else None

    def place(self, location: str) -> Path:
        """A new directory that is named like a location, so that errors name it."""
        if self.root is None or self.process != os.getpid():
            # A fork has directories of its own: whichever process ends first removes only these.
            self.process, self.directories = os.getpid(), {}
            self.root = Path(tempfile.mkdtemp(prefix="weightgeom-")).resolve()
        parts = [part for part in without_secrets(location).split("/") if part not in ("", ".", "..")]
        directory = self.root.joinpath(str(len(self.directories)), *parts)
        directory.mkdir(parents=True)
        return directory

    def remove(self) -> None:
        """Delete them, unless they are of another process."""
        if self.root is not None and self.process == os.getpid():
            forget(self.root)
            shutil.rmtree(self.root, ignore_errors=True)
            self.root, self.directories = None, {}


_temporary = _Temporary()
atexit.register(_temporary.remove)


@contextmanager
def temporary_directories() -> Iterator[None]:
    """A block at whose end the directories of remote checkpoints are removed, also in a forked process."""
    try:
        yield
    finally:
        _temporary.remove()


def remote_checkpoint(location: str, ranges: bool = True) -> Path:
    """A temporary directory with the small files of a remote checkpoint, and stand-ins for its weights.

    `location` is `hf://NAME/MODEL@REVISION`, or the URL of a checkpoint's directory at a web server or in a
    store. It is opened once in a process: later calls give the same directory, which is removed when the
    process ends. Readers of weights fetch the tensors of a stand-in by ranges of bytes; without `ranges` the
    server need not serve them, and only the sizes of the weights are known.

    Raises:
        ConnectionError: if the server fails repeatedly.
        FileNotFoundError: if there is no such checkpoint.
        PermissionError: if the server refuses it.
        ValueError: if it holds no safetensors, or the server does not serve ranges of bytes.
    """
    if (known := _temporary.known(location, ranges)) is not None:
        return known
    _check_form(location)
    directory = _temporary.place(location)
    weights = _opened(location, directory, ranges)
    for name, file in weights.items():
        stand_in(directory / name, file)
    log.info(
        "%s: %d files of weights, %.3g GB, of which tensors are fetched when they are needed",
        *(without_secrets(location), len(weights), sum(file.size for file in weights.values()) / 1e9),
    )
    _temporary.directories[location, ranges] = directory
    return directory


def known_checkpoint(location: str) -> Path | None:
    """The directory that `remote_checkpoint` has given for a location in this process; None if none was."""
    return _temporary.known(location, ranges=True)


def kept_checkpoint(location: str) -> Path:
    """The directory of a checkpoint at a web server or in a store, downloaded whole into HF_HOME/weightgeom.

    Its name depends on the location and on the versions of all files, so that another version is downloaded
    into a directory of its own.

    Raises:
        ConnectionError: if the server fails repeatedly.
        FileNotFoundError: if there is no such checkpoint.
        OSError: if the disk is full.
    """
    from huggingface_hub import constants

    _check_form(location)
    cache = Path(constants.HF_HOME, "weightgeom")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="part-", dir=cache) as part:
        directory = Path(part, "checkpoint")
        weights = _opened(location, directory, ranges=False)
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        versions = [file.description.encode() for _, file in sorted(weights.items())]
        texts = [path.name.encode() + path.read_bytes() for path in files]
        target = cache / hashlib.sha256(b"\n".join([*versions, *texts])).hexdigest()[:16]
        if not target.is_dir():
            log.info("downloading %s to %s", without_secrets(location), target)
            for name, file in weights.items():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                download(file, directory / name)
            try:
                directory.rename(target)
            except OSError:  # another process was faster
                if not target.is_dir():
                    raise
    return target


def remote_files(directory: Path) -> list[RemoteFile]:
    """The remote files that the weights in a directory stand for; none of a checkpoint on disk."""
    files = map(remote_file, sorted(directory.rglob("*.safetensors")))
    return [file for file in files if file is not None]


@dataclass(frozen=True)
class _Site:
    """A checkpoint's directory at a URL: the small files to ask for, and its files where it lists them."""

    url: str
    small: list[str]
    files: Mapping[str, RemoteFile] | None = None
    of_hub: bool = False

    def text(self, name: str) -> bytes | None:
        """The content of a small file; None if there is none."""
        if self.files is not None:
            return whole(self.files[name].url, LARGEST, self.of_hub)
        try:
            return whole(self._url(name), LARGEST)
        except PermissionError:  # which a store also says of a file that it does not have
            if name == "config.json":
                raise
            return None

    def weights(self, name: str, ranges: bool) -> RemoteFile | None:
        """A file of weights; None if there is none."""
        if self.files is not None:
            return self.files.get(name)
        try:
            return probed(self._url(name), ranges)
        except PermissionError:
            return None

    def _url(self, name: str) -> str:
        parts = urlsplit(self.url)
        return parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}").geturl()


def _opened(location: str, directory: Path, ranges: bool) -> dict[str, RemoteFile]:
    """Write the small files of a checkpoint into `directory`; gives the files of its weights by name."""
    site = _site(location)
    directory.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for name, content in zip(site.small, pool.map(site.text, site.small), strict=True):
            if content is not None:
                (directory / name).write_bytes(content)
        if not any((directory / name).is_file() for name in ("config.json", CONFIG)):
            raise FileNotFoundError(_without_config(location))
        inside = [name for name in site.files or () if "/" not in name and name.endswith(".safetensors")]
        names = sorted({SINGLE, *_shards(directory), *_adapter(directory), *inside})
        files = zip(names, pool.map(partial(site.weights, ranges=ranges), names), strict=True)
        weights = {name: file for name, file in files if file is not None and _is_taken(name)}
    if not weights and not (directory / INDEX).is_file():
        raise FileNotFoundError(
            f"{without_secrets(location)} holds no {SINGLE} or {INDEX}: a remote checkpoint must be one of"
            " safetensors; download another format and give its directory"
        )
    return weights


def _shards(directory: Path) -> list[str]:
    """The shards of an index inside its checkpoint; those that lead outside are left to be refused."""
    if not (directory / INDEX).is_file():
        return []
    shards = json_object(directory / INDEX).get("weight_map")
    names = {str(shard) for shard in shards.values()} if isinstance(shards, dict) else set()
    inside = (name for name in names if not Path(name).is_absolute() and ".." not in Path(name).parts)
    return [name for name in inside if name.endswith(".safetensors")]


def _adapter(directory: Path) -> list[str]:
    return [WEIGHTS] if (directory / CONFIG).is_file() else []


def _is_taken(name: str) -> bool:
    return not name.startswith("consolidated")  # Mistral's copy of the weights


def _site(location: str) -> _Site:
    if location.startswith("hf://"):
        return _on_hub(location)
    if location.startswith("http"):
        return _Site(location, [*SMALL, INDEX])
    files = listed(location)
    return _Site(location, _small(files), files)


def _small(files: Mapping[str, RemoteFile]) -> list[str]:
    """The small files of a listed checkpoint: config, tokenizer, templates, index."""
    top = sorted(name for name in files if "/" not in name and _is_taken(name))
    return [name for name in top if any(fnmatch(name, pattern) for pattern in OTHER_FILES)]


def _on_hub(location: str) -> _Site:
    """A revision of a repository, by its commit.

    Raises:
        FileNotFoundError: if the hub does not give it.
    """
    from huggingface_hub import HfApi, constants, hf_hub_url
    from huggingface_hub.hf_api import RepoFile

    name, _, revision = hub_name(location).partition("@")
    if constants.HF_HUB_OFFLINE:
        raise FileNotFoundError(
            f"{location} is read from the hub and HF_HUB_OFFLINE=1 forbids it: unset that, or write"
            f" {hub_name(location)}, which is looked for in the hub's cache"
        )
    try:
        commit = HfApi().model_info(name, revision=revision or None).sha
        tree = list(HfApi().list_repo_tree(name, revision=commit, recursive=True))
    except Exception as error:  # the hub's and the network's errors share no base class
        raise FileNotFoundError(
            f"the hub does not give {location} ({first_line(error)}): check name, revision, network and"
            " HF_TOKEN"
        ) from error
    assert commit is not None
    files = {}
    for entry in tree:
        if isinstance(entry, RepoFile):  # not a folder
            digest = "" if entry.lfs is None else entry.lfs.sha256
            url = hf_hub_url(name, entry.path, revision=commit)
            version = digest or entry.blob_id
            files[entry.path] = RemoteFile(url, entry.size, version, sha256=digest, of_hub=True)
    if revision != commit:
        log.info("%s is commit %s", location, commit)
    return _Site(location, _small(files), files, of_hub=True)


def _check_form(location: str) -> None:
    """Refuse the URL of a file, and of a format that is not read over a network."""
    hub_name(location)
    path = urlsplit(location).path
    if path.endswith(".safetensors"):
        parent = without_secrets(location).rpartition("/")[0]
        raise ValueError(f"{without_secrets(location)} is a file: give the URL of its directory, {parent}")
    if path.endswith((".gguf", ".bin", ".pt", ".pth")):
        raise ValueError(
            f"{without_secrets(location)} is not safetensors, the one format that is read over a network:"
            " download it and give the file or its directory"
        )


def _without_config(location: str) -> str:
    name = without_secrets(location)
    hub = re.fullmatch(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)(?:/(?:tree|blob)/([\w.-]+))?/?", name)
    if hub is not None:
        return f"{name} is a page of the hub: write hf://{hub[1]}@{hub[2] or 'REVISION'}"
    return f"{name} holds no config.json: give the URL of a transformers checkpoint's directory"
