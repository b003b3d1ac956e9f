"""Pickled weights (`pytorch_model.bin`), on request: read by torch's safe loader, written as safetensors."""

import json
import logging
import shutil
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from weightgeom.models.json_files import is_lfs_pointer, json_object
from weightgeom.models.weights import BUFFER
from weightgeom.text.files import first_line

log = logging.getLogger(__name__)
PICKLES = "[ap][dy]*_model*.bin"  # pytorch_model.bin, its shards, and adapter_model.bin
SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
OTHER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # the files of a checkpoint that hold no weights


def is_pickled(directory: Path) -> bool:
    """Whether a checkpoint has pickled weights and no others."""
    return any(directory.glob(PICKLES)) and not any(directory.glob("*.safetensors"))


def convert(source: Path, target: Path) -> None:
    """Write the checkpoint in `source` to `target` with safetensors for weights, file for file.

    Masks and rotary frequencies are left out. Only tensors are unpickled (`weights_only=True`), so that no
    code of the file runs.

    Raises:
        FileNotFoundError: if a shard is missing.
        ValueError: if a file is truncated, corrupt, or holds more than tensors, or if a tensor is in two.
    """
    files: dict[str, str] = {}
    pickles = _files(source)
    for path in pickles:
        name = path.with_suffix(".safetensors").name.replace("pytorch_model", "model", 1)
        tensors = {key: tensor for key, tensor in _unpickled(path).items() if not BUFFER.search(key)}
        if twice := next(filter(files.__contains__, tensors), None):
            raise ValueError(
                f"{source} holds {twice} twice, in {path.name} and in another of its {len(pickles)} pickled"
                " files: remove those of the older save"
            )
        apart = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
        save_file(apart, target / name)  # even where two names share their memory
        files |= dict.fromkeys(tensors, name)
        log.info("%s is written as safetensors", path)
    if len(pickles) > 1:
        index = {"metadata": {}, "weight_map": files}
        (target / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in chain.from_iterable(map(source.glob, OTHER_FILES)):
        if not path.name.startswith("pytorch_model"):
            shutil.copyfile(path, target / path.name)


def _files(source: Path) -> list[Path]:
    """The pickled files of a checkpoint: of shards with an index those that it names."""
    pickles, index = sorted(source.glob(PICKLES)), source / INDEX
    if not index.is_file():
        return pickles
    if (source / SINGLE) in pickles:
        raise ValueError(
            f"{source} holds the weights twice, in {SINGLE} and in the shards of {INDEX}: remove the older of"
            " the two"
        )
    weight_map = json_object(index).get("weight_map")
    shards = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not shards or not all(isinstance(shard, str) and Path(shard).match(PICKLES) for shard in shards):
        raise ValueError(f"{index} is truncated or corrupt; copy or download it again")
    there = {path.name: path for path in pickles}
    if missing := sorted(shards - there.keys()):
        raise FileNotFoundError(f"{index} names {missing[0]}, which is missing from {source}")
    return [there[shard] for shard in sorted(shards)]


def _unpickled(path: Path) -> dict[str, Tensor]:
    if is_lfs_pointer(path):
        raise ValueError(f"{path} is a pointer of git-lfs, not the file: run git lfs pull in {path.parent}")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zip's and torch's errors share no base class
        raise ValueError(
            f"{path} cannot be read as tensors alone ({first_line(error)}): download it again, or ask its"
            " makers for safetensors"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(
            f"{path} holds more than a state dict of tensors: save network.state_dict() alone, or give the"
            " directory of network.save_pretrained(DIRECTORY)"
        )
    return tensors
