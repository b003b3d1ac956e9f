"""Checkpoint files on the hub or on disk: their selection, download, sizes and identity."""

import hashlib
import logging
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from weightgeom.bases.remote import hub_name, is_remote, kept_checkpoint, remote_checkpoint, remote_files
from weightgeom.models.byte_ranges import without_secrets
from weightgeom.models.gguf_files import is_gguf
from weightgeom.models.language_model import trust
from weightgeom.models.pickled import PICKLES, is_pickled
from weightgeom.models.remote import remote_file
from weightgeom.models.weights import as_checkpoint, shards_in_folders
from weightgeom.text.files import first_line, sha256

log = logging.getLogger(__name__)


# Weights, config and tokenizer, without pickles and without code.
CHECKPOINT_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


# Endings of files in a checkpoint's directory that no result depends on: other formats, texts about it.
UNREAD = set(".bin .pt .pth .ckpt .h5 .msgpack .onnx .ot .gguf .md .log .csv .png .pdf".split())


DUPLICATE_FORMATS = ["*/*", "consolidated*"]  # copies of the weights in subfolders or in Mistral's format


MOVING_REVISIONS = {"main", "master", "HEAD", "refs/heads/main"}


SHA256 = re.compile(r"[0-9a-f]{64}")  # the name of a large file in the hub's cache


SHOWN = 12  # revisions of a repository, in an error


HOW_TO_PIN = "set {key}=COMMIT to a commit from https://huggingface.co/{name}/commits/main"


def fetch(
    location: str, bin: bool = False, code: bool = False, weights: bool = True, cache: bool = False
) -> Path:
    """The directory of a checkpoint: a local one, or one downloaded from the hub or found in its cache.

    `location` is a directory, a GGUF file, which is given back itself, or a hub name with or without
    `@revision`. Without a network, or with HF_HUB_OFFLINE=1, a revision is resolved by the cache's refs.
    `bin` includes pickled weights if there are no others; `code` includes the repository's code, which this
    process then trusts.

    Of a URL (`hf://NAME/MODEL@REVISION`, `https://`, `s3://`, `gs://`) it is the temporary directory of
    `remote_checkpoint`; with `cache` one that is downloaded and kept.

    Raises:
        ConnectionError: if a server fails repeatedly.
        FileNotFoundError: if there is neither such a directory nor such a checkpoint on the hub.
        ValueError: if a URL is to give pickled weights or code.
    """
    if is_remote(location):
        if bin or code:
            key = "allow_bin" if bin else "trust_remote_code"
            raise ValueError(
                f"{without_secrets(location)} is read over the network, which takes neither pickled weights"
                f" nor code: leave out model.{key}, or download the checkpoint and give its directory"
            )
        if not (cache and weights):
            return remote_checkpoint(location, ranges=not cache)
        if not (name := hub_name(location)):
            return kept_checkpoint(location)
        location = name
    patterns = patterns_of(weights, code)
    directory = checkpoint_directory(location, patterns)
    if bin and weights and not any(directory.glob("*.safetensors")):
        directory = checkpoint_directory(location, [*patterns, PICKLES])
    if code:
        trust(directory)
    return directory


def patterns_of(weights: bool = True, code: bool = False) -> list[str]:
    """Glob patterns of the files that `fetch` downloads."""
    return [*(CHECKPOINT_FILES if weights else ["*.json"]), *(["*.py"] if code else [])]


def checkpoint_directory(location: str, patterns: list[str]) -> Path:
    """The directory of a checkpoint, with the files that match `patterns` downloaded if it is on the hub.

    Raises:
        FileNotFoundError: if there is neither such a directory nor such a checkpoint on the hub.
    """
    path = Path(location).expanduser()
    if path.is_dir():
        return path.resolve()
    if is_gguf(path):
        return path.resolve()
    if is_remote(location):
        return remote_checkpoint(location)
    if path.is_file():
        advice = (
            f"give its directory, {path.parent}" if path.suffix == ".safetensors" else as_checkpoint(path)
        )
        raise FileNotFoundError(f"{location} is a file, not a checkpoint's directory: {advice}")
    name, _, revision = location.partition("@")
    if is_path(name):
        raise FileNotFoundError(f"no directory {location}: give a checkpoint directory or a hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError

    try:
        snapshot = snapshot_download(
            name, revision=revision or None, allow_patterns=patterns, ignore_patterns=DUPLICATE_FORMATS
        )
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{name} is gated: accept its licence at https://huggingface.co/{name} and set HF_TOKEN"
        ) from error
    except HFValidationError as error:
        raise FileNotFoundError(f"{location!r} is neither a directory nor a hub name") from error
    except Exception as error:  # the hub's, the network's and the cache's errors share no base class
        there = _revisions_there(name, revision) if revision else ""
        advice = "check the name, the revision and the network, or give a directory"
        raise FileNotFoundError(
            f"cannot get {location} from the hub or its local cache ({first_line(error)}):"
            f" {f'{there}; write {name}@REVISION with one that exists' if there else advice}"
        ) from error
    if not revision or revision in MOVING_REVISIONS:
        log.warning("%s is not pinned: write %s@%s to get the same again", name, name, Path(snapshot).name)
    return Path(snapshot)


def _revisions_there(name: str, wanted: str) -> str:
    """The branches and tags of a repository on the hub, or in its cache; of many the nearest in name.

    Empty if there is no such repository.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    try:
        listed = HfApi().list_repo_refs(name)
        where, names = "the hub", [ref.name for ref in (*listed.branches, *listed.tags)]
    except Exception:  # the hub's and the network's errors share no base class
        refs = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "refs")
        files = sorted(path for path in refs.rglob("*") if path.is_file())
        where, names = "the cache", [path.relative_to(refs).as_posix() for path in files]
    if not names:
        return ""
    near = names if len(names) <= SHOWN else get_close_matches(wanted, names, n=SHOWN, cutoff=0.0)
    part = "" if len(names) <= SHOWN else f" and {len(names) - SHOWN} others"
    return f"{where} has the revisions {', '.join(near)}{part}"


def is_path(name: str) -> bool:
    """Whether `name` can only be a directory or a URL, not a hub name."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def identity(directory: Path) -> str:
    """A fingerprint of the contents of a checkpoint's files: weights, config, tokenizer, templates and code.

    Equal for equal copies, wherever they lie. Weights in formats that are not read do not count. A GGUF file
    has that of itself. Remote weights count by the SHA-256 that the hub states, or else by their URL, size
    and version.
    """
    if is_gguf(directory):
        return f"checkpoint/{sha256(directory)[:16]}"
    weights = PICKLES if is_pickled(directory) else "*.safetensors"
    files = [path for path in directory.iterdir() if path.is_file() and not path.name.startswith(".")]
    kept = [path for path in files if path.suffix not in UNREAD or fnmatch(path.name, weights)]
    kept += directory.glob("additional_chat_templates/*.jinja")
    kept += shards_in_folders(directory)
    with ThreadPoolExecutor(4) as pool:  # hashing leaves Python's lock
        digests = zip(
            (str(path.relative_to(directory)) for path in kept), pool.map(_digest, kept), strict=True
        )
    return "checkpoint/" + hashlib.sha256(repr(sorted(digests)).encode()).hexdigest()[:16]


def _digest(path: Path) -> str:
    """The SHA-256 of a file, by its name where it is a large one in the hub's cache."""
    if (file := remote_file(path)) is not None and file.sha256:
        return file.sha256
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and SHA256.fullmatch(blob.name) else sha256(path)


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint that a run needs, and how many of them are on this disk already.

    Sizes are in bytes; `weights` is the size of the weight files, `here` a directory with all files.
    `streamed` files are read over the network and not kept.
    """

    location: str
    count: int
    size: int
    cached: int
    cached_size: int
    weights: int
    here: Path | None = None
    streamed: bool = False

    @property
    def missing(self) -> int:
        """The bytes to be downloaded to this disk."""
        return 0 if self.streamed else self.size - self.cached_size


def checkpoint_files(
    location: str, allow_bin: bool = False, code: bool = False, cache: bool = False
) -> CheckpointFiles:
    """The files of a directory, or of `name@revision` as listed by the hub or, offline, by its cache.

    Of a URL the sizes come from the server; with `cache` the files are to be downloaded. A GGUF file is the
    only one of its checkpoint. Files are selected by the patterns of `fetch`; nothing is downloaded.

    Raises:
        FileNotFoundError: if neither the hub nor the cache has the checkpoint.
    """
    path = Path(location).expanduser()
    if is_gguf(path):
        size = path.stat().st_size
        return CheckpointFiles(location, 1, size, 1, size, size, path.resolve())
    if path.is_dir():
        return _on_disk(location, path)
    if is_remote(location) and not (cache and hub_name(location)):
        directory = remote_checkpoint(location, ranges=not cache)
        weights = [file.size for file in remote_files(directory)]
        files = (path for path in directory.iterdir() if path.is_file())
        small = [path.stat().st_size for path in files if path.suffix != ".safetensors"]
        size, count = sum(weights), len(weights) + len(small)
        return CheckpointFiles(
            without_secrets(location), count, size + sum(small), 0, 0, size, streamed=not cache
        )
    location = hub_name(location) or location
    listed = _listed(location)
    if listed is None:
        return _on_disk(location, fetch(location, allow_bin, code))  # offline, so only from the cache
    patterns = patterns_of(code=code)
    if allow_bin and not any(fnmatch(name, "*.safetensors") for name, _, _ in listed):
        patterns.append(PICKLES)
    needed = [file for file in listed if _taken(file[0], patterns)]
    blobs = _blobs(location.partition("@")[0])
    cached = [size for _, size, blob in needed if (blobs / blob).is_file()]
    weights = sum(
        size for name, size, _ in needed if fnmatch(name, "*.safetensors") or fnmatch(name, PICKLES)
    )
    return CheckpointFiles(
        location, len(needed), sum(size for _, size, _ in needed), len(cached), sum(cached), weights
    )


def _taken(name: str, patterns: Iterable[str]) -> bool:
    matches = any(fnmatch(name, pattern) for pattern in patterns)
    return matches and not any(fnmatch(name, pattern) for pattern in DUPLICATE_FORMATS)


def _listed(location: str) -> list[tuple[str, int, str]] | None:
    """Name, size and blob of every file of a repository; None without a network or with HF_HUB_OFFLINE=1."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.hf_api import RepoFile

    name, _, revision = location.partition("@")
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        tree: Iterable[Any] = HfApi().list_repo_tree(name, revision=revision or None, recursive=True)
        return [
            (entry.path, entry.size, entry.blob_id if entry.lfs is None else entry.lfs.sha256)
            for entry in tree
            if isinstance(entry, RepoFile)  # not a folder
        ]
    except (GatedRepoError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"the hub does not list {location} ({first_line(error)}): check name, revision and HF_TOKEN"
        ) from error
    except (OfflineModeIsEnabled, OSError):
        return None


def _blobs(name: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "blobs")


def _on_disk(location: str, directory: Path) -> CheckpointFiles:
    sizes = {path.name: path.stat().st_size for path in directory.iterdir() if path.is_file()}
    weights = {name: size for name, size in sizes.items() if name.endswith(".safetensors")}
    weights = weights or {name: size for name, size in sizes.items() if fnmatch(name, PICKLES)}
    if not weights:
        raise FileNotFoundError(f"no weights of {location} in {directory}: give a checkpoint with weights")
    taken = weights | {name: size for name, size in sizes.items() if _taken(name, patterns_of())}
    total = sum(taken.values())
    return CheckpointFiles(
        location, len(taken), total, len(taken), total, sum(weights.values()), directory.resolve()
    )
