"""Adapters merged into their base: a whole checkpoint, written shard by shard."""

import json
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from weightgeom.models.adapters import open_checkpoint
from weightgeom.models.loading import load_architecture
from weightgeom.models.pickled import OTHER_FILES
from weightgeom.models.weights import open_params
from weightgeom.params import Params

SHARD = 2**32  # bytes


def merge(adapter: Path, base: Path, target: Path) -> None:
    """Write the checkpoint that `adapter` makes of `base` to `target`; no more than a shard is held.

    Adapted weights are in float32, as rounding to the base's dtype would lose part of the update; the others,
    the config and the tokenizer are those of the base.

    Raises:
        ValueError: if the adapter does not fit the base.
    """
    architecture = load_architecture(base)
    params = open_checkpoint(adapter, architecture, open_params(base, architecture))
    files: dict[str, str] = {}
    for number, shard in enumerate(_shards(params), 1):
        name = f"model-{number:05d}.safetensors"
        save_file(shard, target / name, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": files}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in chain.from_iterable(map(base.glob, OTHER_FILES)):
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    if architecture.tied and architecture.unembed in params:
        config = json.loads((base / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}, indent=2))


def _shards(params: Params) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name in params:
        tensor = params[name].clone().contiguous()
        if shard and size + tensor.nbytes > SHARD:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard
