"""Checkpoint files on the hub or on disk: which ones are fetched, their sizes and their identity."""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from weightgeom.models.language_model import trust
from weightgeom.models.pickled import PICKLES, is_pickled
from weightgeom.text.files import first_line

log = logging.getLogger(__name__)


# Weights, config and tokenizer; never pickles, never code.
FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


OTHERS = ["*/*", "consolidated*"]  # the same weights in other formats, in folders or Mistral's own


MOVING = {"main", "master", "HEAD", "refs/heads/main"}


PIN = "give {key}=COMMIT, the newest of which https://huggingface.co/{name}/commits/main shows"


def fetch(location: str, bin: bool = False, code: bool = False, weights: bool = True) -> Path:
    """The directory of a checkpoint: itself, or downloaded from the hub, or taken from its cache.

    `location` is a directory, or a hub name with or without `@revision`. Without a network, or with
    HF_HUB_OFFLINE=1, a revision resolves through the cache's refs. Pickled weights come with `bin` where
    there are no others, and the repository's code with `code`, which is then trusted in this process.

    Raises:
        FileNotFoundError: if there is no such directory and the hub does not give it either.
    """
    patterns = patterns_of(weights, code)
    found = _found(location, patterns)
    if bin and weights and not any(found.glob("*.safetensors")):
        found = _found(location, [*patterns, PICKLES])
    if code:
        trust(found)
    return found


def patterns_of(weights: bool = True, code: bool = False) -> list[str]:
    """Patterns of the files of a repository that `fetch` takes."""
    return [*(FILES if weights else ["*.json"]), *(["*.py"] if code else [])]


def _found(location: str, patterns: list[str]) -> Path:
    path = Path(location).expanduser()
    if path.is_dir():
        return path.resolve()
    name, _, revision = location.partition("@")
    if is_path(name):
        raise FileNotFoundError(
            f"there is no directory {location}: give a checkpoint directory or a hub name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError

    try:
        found = snapshot_download(
            name, revision=revision or None, allow_patterns=patterns, ignore_patterns=OTHERS
        )
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{name} is gated: accept its licence on https://huggingface.co/{name} and set HF_TOKEN"
        ) from error
    except HFValidationError as error:
        raise FileNotFoundError(f"{location!r} is neither a directory nor a hub name") from error
    except Exception as error:  # the hub's, the network's and the cache's errors share no base class
        raise FileNotFoundError(
            f"cannot get {location} from the hub or its local cache ({first_line(error)}):"
            " check the name, the revision and the network, or give a directory"
        ) from error
    if not revision or revision in MOVING:
        log.warning("%s is not pinned: to get the same again, write %s@%s", name, name, Path(found).name)
    return Path(found)


def is_path(name: str) -> bool:
    """Whether this can be a directory alone, and no name of the hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def identity(directory: Path) -> str:
    """A fingerprint of a checkpoint without reading its weights: path, sizes and times of its files."""
    kinds = (".bin" if is_pickled(directory) else ".safetensors", ".json")
    files = sorted(path for path in directory.iterdir() if path.suffix in kinds)
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return "checkpoint/" + hashlib.sha256(repr((str(directory), stats)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Files:
    """The files of a checkpoint that a run takes, and those of them that are on this disk already.

    Sizes are in bytes; `weights` is that of the weights among them, `here` a directory that has all of it.
    """

    location: str
    count: int
    size: int
    cached: int
    cached_size: int
    weights: int
    here: Path | None = None

    @property
    def missing(self) -> int:
        """The bytes to be downloaded."""
        return self.size - self.cached_size


def files_of(location: str, allow_bin: bool = False, code: bool = False) -> Files:
    """The files of a directory, or of `name@revision` as the hub lists them, or offline as its cache has.

    By the patterns that `fetch` downloads by; nothing is downloaded.

    Raises:
        FileNotFoundError: if neither the hub nor the cache knows it.
    """
    path = Path(location).expanduser()
    if path.is_dir():
        return _on_disk(location, path)
    listed = _listed(location)
    if listed is None:
        return _on_disk(location, fetch(location, allow_bin, code))  # offline, it is in the cache or refused
    patterns = patterns_of(code=code)
    if allow_bin and not any(fnmatch(name, "*.safetensors") for name, _, _ in listed):
        patterns.append(PICKLES)
    some = [one for one in listed if _taken(one[0], patterns)]
    blobs = _blobs(location.partition("@")[0])
    cached = [size for _, size, blob in some if (blobs / blob).is_file()]
    weights = sum(size for name, size, _ in some if fnmatch(name, "*.safetensors") or fnmatch(name, PICKLES))
    return Files(location, len(some), sum(size for _, size, _ in some), len(cached), sum(cached), weights)


def _taken(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, one) for one in patterns) and not any(fnmatch(name, one) for one in OTHERS)


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
            (one.path, one.size, one.blob_id if one.lfs is None else one.lfs.sha256)
            for one in tree
            if isinstance(one, RepoFile)  # and no folder
        ]
    except (GatedRepoError, HfHubHTTPError) as error:
        raise FileNotFoundError(f"the hub does not list {location} ({first_line(error)})") from error
    except (OfflineModeIsEnabled, OSError):
        return None


def _blobs(name: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "blobs")


def _on_disk(location: str, directory: Path) -> Files:
    sizes = {path.name: path.stat().st_size for path in directory.iterdir() if path.is_file()}
    weights = {name: size for name, size in sizes.items() if name.endswith(".safetensors")}
    weights = weights or {name: size for name, size in sizes.items() if fnmatch(name, PICKLES)}
    if not weights:
        raise FileNotFoundError(
            f"there are no weights of {location} in {directory}: give a checkpoint that has"
        )
    taken = weights | {name: size for name, size in sizes.items() if _taken(name, patterns_of())}
    whole = sum(taken.values())
    return Files(location, len(taken), whole, len(taken), whole, sum(weights.values()), directory.resolve())
