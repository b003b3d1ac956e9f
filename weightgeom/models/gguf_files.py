"""GGUF files: their config and tokenizer, and their conversion to a checkpoint's directory."""

import io
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from weightgeom.models.experts import unstacked
from weightgeom.models.json_files import is_lfs_pointer
from weightgeom.models.residual import architecture_of
from weightgeom.models.weights import SPACINGS, opened
from weightgeom.text.files import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
GIB = 2**30
# Of a block of each format, the bytes with the lowest bits of all codes, and these bits; layouts of ggml.
LOWEST_BITS = {
    "Q4_0": (2, 18, 0x11),
    "Q4_1": (4, 20, 0x11),
    "Q5_0": (6, 22, 0x11),
    "Q5_1": (8, 24, 0x11),
    "Q8_0": (2, 34, 0x01),
    "Q2_K": (16, 80, 0x55),
    "Q3_K": (32, 96, 0x55),
    "Q4_K": (16, 144, 0x11),
    "Q5_K": (48, 176, 0x11),
    "Q6_K": (0, 128, 0x11),
    "IQ4_NL": (2, 18, 0x11),
    "IQ4_XS": (8, 136, 0x11),
    "MXFP4": (1, 17, 0x11),
}
FLOATS = ("F16", "BF16", "F32", "F64")
IN_BLOCK = 16  # neighbours that have one scale in every format
EQUAL = 1e-3  # relative: differences of dequantised numbers are rounded


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its name."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def gguf_config(path: Path) -> "PreTrainedConfig":
    """The config in a GGUF file.

    Raises:
        ValueError: if the file cannot be read, or the package gguf is missing.
    """
    from transformers import AutoConfig

    with _explained(path):
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


def gguf_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in a GGUF file.

    Raises:
        ValueError: if there is none or it cannot be read.
    """
    from transformers import AutoTokenizer

    with _explained(path):
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def convert_gguf(source: Path, target: Path) -> None:
    """Write the model in a GGUF file to the directory `target`: config, tokenizer and dequantised weights.

    Each weight is stored in bfloat16 or float16 where that holds it exactly, else in float32. The spacings of
    the grids that quantised weights are on are stored next to them.

    Raises:
        NotImplementedError: if the type of model has no residual-stream map.
        ValueError: if the file cannot be read.
    """
    config = gguf_config(source)
    stacks = architecture_of(config).stacks
    gguf_tokenizer(source).save_pretrained(target)
    config.save_pretrained(target)
    weights = target / "model.safetensors"
    stored = {name: _narrowest(weight) for name, weight in unstacked(_loaded(source), stacks).items()}
    save_file(stored, weights, metadata={"format": "pt"})
    del stored  # the file has them, and the next network as many
    with NamedTemporaryFile(dir=target, suffix=".gguf") as neighbour:
        shutil.copyfile(source, neighbour.name)
        if _move_codes(source, Path(neighbour.name)):
            moved = unstacked(_loaded(Path(neighbour.name)), stacks)
            held = opened(weights)
            spacings = {name: (weight - held.get_tensor(name)).abs_() for name, weight in moved.items()}
            kept = {name: _by_block(spacing) for name, spacing in spacings.items() if bool(spacing.any())}
            save_file(kept, target / SPACINGS)
    size = sum(path.stat().st_size for path in target.iterdir())
    log.info("%s is written dequantised to %s, %.2f GiB", source, target, size / GIB)


def _loaded(path: Path) -> dict[str, Float[Tensor, "..."]]:
    """The weights by the names that the network has for them, in float32, tied ones once."""
    with _explained(path):
        from transformers import AutoModelForCausalLM, GgufConfig

        network = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def _move_codes(source: Path, target: Path) -> bool:
    """Change the lowest bit of all codes in the copy `target`, which is one step; whether there are any."""
    from gguf import GGUFReader
    from gguf.constants import GGML_QUANT_SIZES

    tensors = GGUFReader(source).tensors
    content = np.memmap(target, mode="r+")
    unknown: dict[str, int] = {}
    for tensor in tensors:
        kind = tensor.tensor_type.name
        if kind in LOWEST_BITS:
            start, stop, bits = LOWEST_BITS[kind]
            size = GGML_QUANT_SIZES[tensor.tensor_type][1]
            offset = int(tensor.data_offset)
            content[offset : offset + int(tensor.n_bytes)].reshape(-1, size)[:, start:stop] ^= bits
        elif kind not in FLOATS:
            unknown[kind] = unknown.get(kind, 0) + 1
    content.flush()
    for kind, number in unknown.items():
        log.warning(
            "%d tensors of %s are in the format %s, of which rounding_share does not know the grid",
            *(number, source, kind),
        )
    return any(tensor.tensor_type.name in LOWEST_BITS for tensor in tensors)


def _narrowest(weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(weight.to(dtype).float(), weight):
            return weight.to(dtype)
    return weight.contiguous()


def _by_block(spacings: Float[Tensor, "*rows columns"]) -> Float[Tensor, "*rows blocks"]:
    """One spacing for each block of neighbours, where all of them are alike."""
    if spacings.shape[-1] % IN_BLOCK == 0:
        blocks = spacings.unflatten(-1, (-1, IN_BLOCK))
        low, high = blocks.aminmax(dim=-1)
        if bool((high - low <= EQUAL * high).all()):
            return high.contiguous()
    return spacings.contiguous()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Errors of reading the file in one sentence, without the progress bars of transformers."""
    if find_spec("gguf") is None:
        raise ValueError(f"reading {path} needs the package gguf: pip install gguf")
    if is_lfs_pointer(path):
        raise ValueError(f"{path} is a pointer of git-lfs, not the file: run git lfs pull in {path.parent}")
    try:
        with redirect_stderr(io.StringIO()):
            yield
    except Exception as error:  # the reader's and transformers' errors share no base class
        raise ValueError(f"{path} cannot be read as a GGUF checkpoint: {first_line(error)}") from error
