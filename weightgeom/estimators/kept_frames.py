"""Reference subspaces on disk, so that processes that measure one trajectory make them once."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from weightgeom.estimators.moments import Resampled, Settled
from weightgeom.estimators.reference_subspaces import Frame
from weightgeom.geometry.subspace import Subspace


def keep_frames(frames: Iterable[Frame], directory: Path) -> None:
    """Write frames, whose moments are settled, as `frame-000000.safetensors`, ... in their order."""
    for number, frame in enumerate(frames):
        tensors = {"space": frame.space.basis}
        about: dict[str, object] = {"place": frame.place, "rank": frame.rank}
        if frame.moment is not None:
            assert isinstance(frame.moment, Settled) and frame.moment.within is None
            tensors["root"] = frame.moment.root
            about["moment"] = {key: getattr(frame.moment, key) for key in ("samples", "groups", "centred")}
        if frame.resampled is not None:
            tensors |= {"tops": frame.resampled.tops, "resampled_shares": frame.resampled.shares}
        for half, (space, shares) in enumerate(frame.crossfit):
            tensors |= {f"half_{half}": space.basis, f"half_shares_{half}": shares}
        # Products of other layouts in memory differ in their last digits, and a file has only one.
        orders = {name: _order(tensor) for name, tensor in tensors.items()}
        stored = {name: tensor.permute(orders[name]).contiguous() for name, tensor in tensors.items()}
        about |= {"orders": orders, "devices": {name: str(tensor.device) for name, tensor in tensors.items()}}
        path = directory / f"frame-{number:06}.safetensors"
        save_file(stored, path, {"about": json.dumps(about)})
        del frame, tensors, stored  # before the next one is made


def kept_frames(directory: Path) -> Iterator[Frame]:
    """The frames that `keep_frames` has written, one at a time and bit for bit, each on its device."""
    for path in sorted(directory.glob("frame-*.safetensors")):
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: _as_made(file.get_tensor(name), about, name) for name in file.keys()}
        moment = Settled(tensors["root"], **about["moment"]) if "root" in tensors else None
        resampled = Resampled(tensors["tops"], tensors["resampled_shares"]) if "tops" in tensors else None
        halves = range(sum(name.startswith("half_shares_") for name in tensors))
        crossfit = tuple(
            (Subspace(tensors[f"half_{half}"]), tensors[f"half_shares_{half}"]) for half in halves
        )
        yield Frame(
            tuple(about["place"]), Subspace(tensors["space"]), moment, resampled, crossfit, about["rank"]
        )
        del tensors, moment, resampled, crossfit  # before the next one is read


def _order(tensor: Tensor) -> list[int]:
    """The dimensions in the order of memory, the outermost first."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def _as_made(stored: Tensor, about: dict, name: str) -> Tensor:
    order = about["orders"][name]
    # In memory of its own, aligned as any: that of a file is not, and the last digits depend on it.
    own = stored.to(torch.device(about["devices"][name])).clone()
    return own.permute([order.index(place) for place in range(len(order))])
