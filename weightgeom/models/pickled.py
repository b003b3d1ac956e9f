"""Pickled weights (`pytorch_model.bin`), on request: read by torch's safe loader, written as safetensors."""

import json
import logging
import shutil
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from weightgeom.models.json_files import is_lfs_pointer
from weightgeom.models.weights import BUFFER
from weightgeom.text.files import first_line

log = logging.getLogger(__name__)
PICKLES = "[ap][dy]*_model*.bin"  # pytorch_model.bin, its shards, and adapter_model.bin
OTHER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # the files of a checkpoint that hold no weights


def is_pickled(directory: Path) -> bool:
    """Whether a checkpoint has pickled weights and no others."""
    return any(directory.glob(PICKLES)) and not any(directory.glob("*.safetensors"))


def convert(source: Path, target: Path) -> None:
    """Write the checkpoint in `source` to `target` with safetensors for weights, file for file.

    Masks and rotary frequencies are left out. Only tensors are unpickled (`weights_only=True`), so that no
    code of the file runs.

    Raises:
        ValueError: if a file is truncated, corrupt, or holds more than tensors.
    """
    files: dict[str, str] = {}
    pickles = sorted(source.glob(PICKLES))
    for path in pickles:
        name = path.with_suffix(".safetensors").name.replace("pytorch_model", "model", 1)
        tensors = {key: tensor for key, tensor in _unpickled(path).items() if not BUFFER.search(key)}
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
