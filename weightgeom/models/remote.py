"""Remote safetensors files: the header read once, and tensors fetched by ranges of bytes when asked for."""

import json
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from weightgeom.models.byte_ranges import RemoteFile, fetched

LAYER = re.compile(r".*?\.\d+\.")  # the layer, in the name of a tensor
SMALL = 2**27  # bytes of a checkpoint that are kept in any case
AT_ONCE = 4  # checkpoints: the start, the one before, the one measured, and an adapter's base
LARGEST_HEADER = 100_000_000  # bytes, the limit of the format
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


class Entry(NamedTuple):
    """A tensor in a file: its dtype as the file names it, its shape, and its bytes' places in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def get_shape(self) -> list[int]:
        """The shape, as a slice of a file on disk gives it."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """The dtype, as a slice of a file on disk gives it."""
        return self.dtype


@dataclass(frozen=True, eq=False)
class RemoteTensors(Mapping[str, Tensor]):
    """The tensors of a remote safetensors file, each fetched when it is asked for (`Recent`).

    `get_tensor` and `get_slice` are those of a file on disk, for readers of either.
    """

    file: RemoteFile
    entries: Mapping[str, Entry]

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        kept = recent(self.file)
        content = kept.get((self.file, name), lambda: fetched(self.file, entry.start, entry.stop))
        return content.view(DTYPES[entry.dtype]).view(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # the inherited one would fetch the tensor

    def get_tensor(self, name: str) -> Tensor:
        """One tensor."""
        return self[name]

    def get_slice(self, name: str) -> Entry:
        """The shape and dtype of one tensor, from the header alone."""
        return self.entries[name]


@dataclass(eq=False)
class Recent:
    """The bytes of the tensors of a remote checkpoint that were asked for last; its methods mutate it.

    Small checkpoints are kept whole, and of others the last tensor. A walk asks for the weights of a layer
    once for each batch and then for their updates, so that of a `walked` checkpoint a layer is kept as well.
    """

    layers: Counter[str] = field(default_factory=Counter)  # bytes of each
    walked: bool = False
    kept: OrderedDict[tuple[RemoteFile, str], Tensor] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def room(self) -> int:
        """Bytes: a walk needs a layer and a tensor or two of the next; 5/4 is ours."""
        layer = max(self.layers.values(), default=0) * 5 // 4
        return max(SMALL, layer if self.walked else 0)

    def get(self, key: tuple[RemoteFile, str], fetch: Callable[[], Tensor]) -> Tensor:
        """The bytes of a tensor, which must not be written to; fetched if they are not kept."""
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]
        content = fetch()
        with self.lock:
            self.kept[key] = content
            held = sum(tensor.nbytes for tensor in self.kept.values())
            while held > self.room and len(self.kept) > 1:
                _, dropped = self.kept.popitem(last=False)
                held -= dropped.nbytes
        return content

    def enter(self, entries: Mapping[str, Entry]) -> None:
        """Count the layers of another file of the checkpoint."""
        with self.lock:
            for name, entry in entries.items():
                if (match := LAYER.match(name)) is not None:
                    self.layers[match[0]] += entry.stop - entry.start

    def forget(self) -> None:
        """Drop all of them."""
        with self.lock:
            self.kept.clear()


# By the URL of the checkpoint's directory, the one asked for last at the end.
_recent: OrderedDict[str, Recent] = OrderedDict()


def recent(file: RemoteFile) -> Recent:
    """The tensors that are kept of the checkpoint that a file belongs to.

    Those of all but the last `AT_ONCE` checkpoints are dropped: a chain may have hundreds.
    """
    directory = file.url.rpartition("/")[0]
    kept = _recent.setdefault(directory, Recent())
    _recent.move_to_end(directory)
    for tensors in [*_recent.values()][:-AT_ONCE]:
        tensors.forget()
    return kept


_stand_ins: dict[str, RemoteFile] = {}


def stand_in(path: Path, file: RemoteFile) -> None:
    """Let a small file at `path`, which is written, stand for a remote one in this process; remembers it.

    Only this memory makes it one: no content of a file on disk can lead a reader to a URL.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(file.description)
    _stand_ins[str(path)] = file


def remote_file(path: Path) -> RemoteFile | None:
    """The remote file that a path stands for; None for a file on disk."""
    return _stand_ins.get(str(path))


def forget(directory: Path) -> None:
    """Let no path in a directory stand for a remote file any more; mutates the memory of this process."""
    for path in [path for path in _stand_ins if Path(path).is_relative_to(directory)]:
        del _stand_ins[path]
    for tensors in _recent.values():
        tensors.forget()


@cache  # a header is read once in a process
def remote_tensors(file: RemoteFile) -> "RemoteTensors":
    """The tensors of a remote safetensors file; reads its header.

    Layout: 8 bytes with the header's length, the header in JSON, and the tensors, little-endian and without
    gaps (safetensors format).

    Raises:
        ConnectionError: if the server fails repeatedly.
        ValueError: if the header is corrupt or does not fit the file's size.
    """
    if file.size < 8:
        _refuse_content(file, f"it has {file.size} bytes")
    length = int.from_bytes(_bytes(fetched(file, 0, 8)), "little")
    if not 2 <= length <= min(LARGEST_HEADER, file.size - 8):
        _refuse_content(file, f"it names a header of {length} bytes in a file of {file.size}")
    try:
        header = json.loads(_bytes(fetched(file, 8, 8 + length)))
        entries = {
            str(name): _entry(tensor, 8 + length) for name, tensor in header.items() if name != "__metadata__"
        }
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        if type(error) is ValueError and str(error).startswith("header:"):
            _refuse_content(file, str(error).removeprefix("header: "))
        _refuse_content(file, "its header is not a JSON object of tensors")
    place = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start != place:
            _refuse_content(file, f"the bytes of {name} do not follow those of the tensor before it")
        place = entry.stop
    if place != file.size:
        _refuse_content(file, f"its header describes {place} bytes and the server has {file.size}")
    recent(file).enter(entries)
    return RemoteTensors(file, entries)


def _entry(tensor: Any, base: int) -> Entry:
    dtype, shape, (start, stop) = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"header: the dtype {dtype} is not read over a network; add ++model.cache=true")
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise TypeError(dtype)
    if prod(shape) * DTYPES[dtype].itemsize != stop - start:
        raise ValueError(f"header: a tensor of shape {tuple(shape)} in {dtype} has {stop - start} bytes")
    return Entry(dtype, tuple(shape), base + start, base + stop)


def _refuse_content(file: RemoteFile, reason: str) -> NoReturn:
    raise ValueError(f"{file} is truncated or corrupt: {reason}; upload it again, or give another copy")


def _bytes(content: Tensor) -> bytes:
    return content.numpy().tobytes()
