"""What a checkpoint's files come to, on the hub, in its cache or in a directory, before any is fetched."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from weightgeom.model import first_line
from weightgeom.pickled import PICKLES
from weightgeom.pretrained import OTHERS, fetch, patterns_of


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
    from huggingface_hub import HfApi, constants  # noqa: PLC0415 (heavy)
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled  # noqa: PLC0415
    from huggingface_hub.hf_api import RepoFile  # noqa: PLC0415

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
    from huggingface_hub import constants  # noqa: PLC0415 (heavy)
    from huggingface_hub.file_download import repo_folder_name  # noqa: PLC0415

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
