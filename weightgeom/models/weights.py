"""Weights on disk: checkpoints and the difference of two, read tensor by tensor."""

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weightgeom.compat.conversions import renaming
from weightgeom.models.codes import fp8_spacing, fp8_values, mxfp4_spacing, mxfp4_values
from weightgeom.models.experts import Part, parts_of
from weightgeom.models.json_files import is_lfs_pointer, json_object
from weightgeom.models.quantisation import Codes, check_not_quantised, codes_among, is_of_activations
from weightgeom.models.remote import RemoteTensors, recent, remote_file, remote_tensors
from weightgeom.models.residual import Architecture
from weightgeom.params import Params

log = logging.getLogger(__name__)
# Old checkpoints of GPT-2, GPT-NeoX and Llama also store causal masks and rotary frequencies, and those of
# Apertus the constants of its activation.
BUFFER = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$|\.act_fn\.(beta|eps)$")
# Left in front of a parameter's name by DataParallel, PEFT, DeepSpeed, and anywhere in it by the others.
INSIDE = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
WRAPPERS = re.compile(rf"^(?:(?:module|_forward_module|base_model\.model|{INSIDE})\.)+|(?<=\.)(?:{INSIDE})\.")
TEXT_MODEL = re.compile(r"(?:model\.)?language_model\.")  # of a model that also sees or hears
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = re.compile(r"(?:pytorch_model|adapter_model).*\.bin")
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz")
ROWS = 4096  # that are looked at together
SPACINGS = "spacings.safetensors"  # of the grids that the weights of a converted checkpoint are on
OF_A_TRAINER = re.compile(r"(?:training_args|optimizer|scheduler|scaler|rng_state).*")


@dataclass(frozen=True, eq=False)
class Stored(Mapping[str, Tensor]):
    """Tensors in safetensors files, each a view of file pages that is mapped when it is asked for.

    `entries` gives for each name in memory the file and the tensor's name in it. A file is opened anew
    for every tensor, so that its pages leave the process's memory with the tensor. `parts` are the
    parameters of experts whose stacks are among the entries: they stand in their place.
    """

    entries: Mapping[str, tuple[Path, str]]
    parts: Mapping[str, Part] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        if (part := self.parts.get(name)) is not None:
            return part.of(self[part.name])
        path, key = self.entries[name]
        return opened(path).get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        stacks = {part.name for part in self.parts.values()}
        yield from (name for name in self.entries if name not in stacks)
        yield from self.parts

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self.entries or name in self.parts  # the inherited one would read the tensor

    @property
    def is_wrapped(self) -> bool:
        """Whether names on disk have prefixes that only `names_in_memory` passes over."""
        return any(WRAPPERS.search(key) or TEXT_MODEL.match(key) for _, key in self.entries.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, from the file's header alone."""
        if (part := self.parts.get(name)) is not None:
            return part.shape(self.shape(part.name))
        path, key = self.entries[name]
        return tuple(opened(path).get_slice(key).get_shape())


@dataclass(frozen=True, eq=False)
class Dequantised(Mapping[str, Tensor]):
    """The weights of a quantised checkpoint, each computed from its codes and scales when it is asked for.

    Those of a checkpoint that was converted are values already, with the spacings of their grids for scales.
    `codes` has those of the quantised ones by the names that they have in memory; the others are `stored`.
    The entries of `stored` for quantised weights are their codes, and `scales` has the entries of the scales.
    """

    stored: Stored
    codes: Mapping[str, Codes]
    scales: Mapping[str, tuple[Path, str]]

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        return self._computed(name, spacing=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    @property
    def is_wrapped(self) -> bool:
        """Whether only `names_in_memory` finds the names: always, as no other loader is to read the codes."""
        return True

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one weight, from the files' headers alone."""
        if (part := self.stored.parts.get(name)) is not None:
            return part.shape(self.shape(part.name))
        stored = self.stored.shape(name)
        if name not in self.codes or self.codes[name].rule != "mxfp4":
            return stored
        experts, rows, groups, size = stored
        return experts, 2 * groups * size, rows

    def spacing(self, name: str) -> Float[Tensor, "..."] | None:
        """The distance of neighbouring values of a quantised weight's grid, by entry; None for others."""
        part = self.stored.parts.get(name)
        quantised = (name if part is None else part.name) in self.codes
        return self._computed(name, spacing=True) if quantised else None

    def _computed(self, name: str, spacing: bool) -> Float[Tensor, "..."]:
        """A weight or its spacings; of a stack of experts only the one that is asked for."""
        part = self.stored.parts.get(name)
        whole = name if part is None else part.name
        if (codes := self.codes.get(whole)) is None:
            return self.stored[name]
        entries = (self.stored.entries[whole], self.scales[whole])
        stored, scale = (opened(path).get_tensor(key) for path, key in entries)
        if part is not None:
            stored = stored[part.expert : part.expert + 1]
            scale = scale[part.expert : part.expert + 1] if scale.ndim > 1 else scale
        if codes.rule == "mxfp4":
            made = mxfp4_spacing(stored, scale) if spacing else mxfp4_values(stored, scale)
        elif codes.rule == "fp8":
            made = (fp8_spacing if spacing else fp8_values)(stored, scale, codes.block)
        else:
            made = scale.repeat_interleave(stored.shape[-1] // scale.shape[-1], -1) if spacing else stored
        return made if part is None else part.stack.apart(made[0], part.place)


@dataclass(frozen=True, eq=False)
class Difference(Mapping[str, Tensor]):
    """`after` minus `before`, each tensor computed in float32 when it is asked for."""

    after: Params
    before: Params

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        return self.after[name].float() - self.before[name].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.after)

    def __len__(self) -> int:
        return len(self.after)

    def __contains__(self, name: object) -> bool:
        return name in self.after


@dataclass(frozen=True, eq=False)
class Untied(Mapping[str, Tensor]):
    """Weights by every name that the network has for them, the unembedding included where it is tied."""

    params: Params
    architecture: Architecture

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        tied = name == self.architecture.unembed
        return self.architecture.unembedding(self.params) if tied else self.params[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.params
        if self.architecture.tied and self.architecture.unembed not in self.params:
            yield self.architecture.unembed

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self.params or (self.architecture.tied and name == self.architecture.unembed)


def open_params(directory: Path, architecture: Architecture) -> Params:
    """The parameters of a checkpoint, read lazily and under the names that they have in memory.

    The names are those of `names_in_memory`; GPT-2 on the hub leaves out the base model's prefix.

    Raises:
        FileNotFoundError: if the directory, its safetensors or one of its shards is missing.
        ValueError: if a file is truncated or corrupt, the index does not fit its shards, or the checkpoint
            is quantised.
    """
    stored = _files(directory)
    codes = _codes(directory, stored)
    plain = {key: (path, key) for key, path in stored.items()}
    for weight, parts in codes.items():
        del plain[parts.scale]
        plain[weight] = plain.pop(parts.codes)
    if codes:
        plain = {key: entry for key, entry in plain.items() if not is_of_activations(key)}
    names = names_in_memory(plain, architecture, str(directory))
    whole = {name: stack for name, stack in architecture.stacks.items() if name in names.values()}
    entries = Stored({name: plain[key] for key, name in names.items()}, parts_of(whole))
    quantised = {names[weight]: parts for weight, parts in codes.items() if weight in names}
    scales = {name: (stored[parts.scale], parts.scale) for name, parts in quantised.items()}
    if (spacings := directory / SPACINGS).is_file():
        of_keys = {key: name for key, name in names.items() if key in set(opened(spacings).keys())}
        quantised |= {name: Codes(key, key, "converted", (1, 1)) for key, name in of_keys.items()}
        scales |= {name: (spacings, key) for key, name in of_keys.items()}
    return Dequantised(entries, quantised, scales) if quantised else entries


def names_in_memory(stored: Collection[str], architecture: Architecture, where: str) -> dict[str, str]:
    """The names of parameters in memory by those that they are stored under; errors call them by `where`.

    Prefixes that wrappers leave are passed over. Of a model that also sees or hears, the parameters are those
    of its text model. Names are translated as transformers does it where the disk has others, and get the
    base model's prefix where all of them leave it out. Masks and other buffers are left out.

    Raises:
        ValueError: if two stored names are the same parameter, factors of an adapter are among them, or none
            is that of the embedding.
    """
    plain = {key: WRAPPERS.sub("", key) for key in stored}
    if factors := [key for key, name in plain.items() if ".lora_" in name]:
        raise ValueError(
            f"{where} holds {factors[0]} as well as the weights of its base: merge the adapter with PEFT's"
            " merge_and_unload and save the merged network"
        )
    kept = {key: name for key, name in plain.items() if not BUFFER.search(name)}
    in_memory = renaming(architecture.model_type)
    if any(TEXT_MODEL.match(name) for name in kept.values()):
        kept = {
            key: TEXT_MODEL.sub("", name, count=1)
            for key, name in kept.items()
            if TEXT_MODEL.match(name) or in_memory(name) == architecture.unembed
        }
    translated = {key: architecture.aliases.get(name) or in_memory(name) for key, name in kept.items()}
    prefix = architecture.embed.partition(".")[0] + "."
    bare = not any(name.startswith(prefix) for name in translated.values())
    names: dict[str, str] = {}
    keys: dict[str, str] = {}
    for key, short in kept.items():
        name = translated[key]
        if bare and name != architecture.unembed:
            name = architecture.aliases.get(prefix + short, prefix + name)
        names[key] = name
        if (other := keys.setdefault(names[key], key)) != key:
            raise ValueError(f"{where} holds {names[key]} twice, as {other} and as {key}: remove one of them")
    if bare and names and architecture.embed not in keys:
        raise ValueError(
            f"{where} holds {next(iter(names))}, and no {architecture.embed}: its names are not those of a"
            f" {architecture.model_type} network; load the weights into one, and save it with save_pretrained"
        )
    return names


def check_finite(params: Params, architecture: Architecture, label: str) -> None:
    """Refuse embeddings, norms and biases with values that are not finite.

    An update is refused where it is measured; a token that the measured text lacks would hide the others.

    Raises:
        ValueError: with the first such parameter.
    """
    updates = {matrix.parameter for matrix in architecture.matrices}
    for name in (name for name in params if name not in updates):
        blocks = params[name].split(ROWS) if params[name].ndim else (params[name],)
        if not all(bool(block.isfinite().all()) for block in blocks):
            raise ValueError(
                f"{name} of {label} has values that are not finite: the checkpoint is corrupt, or its"
                " training diverged; copy or download it again, or give an earlier one"
            )


def difference(after: Params, before: Params, architecture: Architecture | None = None) -> Params:
    """The update from `before` to `after`, in float32 and tensor by tensor.

    Names and shapes are compared now, from the headers alone where the weights are on disk. With an
    `architecture` that ties them, the unembedding of `before` is its embedding where only `after` has one.

    Raises:
        ValueError: if they do not agree.
    """
    if architecture is not None and architecture.tied and architecture.unembed in after:
        before = Untied(before, architecture)
    names = [*after, *(name for name in before if name not in after)]
    shapes = {name: (shape_of(after, name), shape_of(before, name)) for name in names}
    unequal = [name for name, (new, old) in shapes.items() if new != old]
    if unequal:
        new, old = shapes[unequal[0]]
        raise ValueError(
            f"{unequal[0]} is {_in_words(new)} after and {_in_words(old)} before, and "
            f"{len(unequal) - 1} more parameters differ: take two checkpoints of one architecture"
        )
    return Difference(after, before)


def walked(params: Params) -> bool:
    """Whether these are the weights of a checkpoint at a URL, of which a layer is kept from now on."""
    stored = params.stored if isinstance(params, Dequantised) else params
    paths = {path for path, _ in stored.entries.values()} if isinstance(stored, Stored) else set()
    files = [file for file in map(remote_file, paths) if file is not None]
    for file in files:
        recent(file).walked = True
    return bool(files)


def shape_of(params: Params, name: str) -> tuple[int, ...] | None:
    """The shape of a parameter, of weights on disk from their headers alone; None where there is none."""
    if name not in params:
        return None
    on_disk = isinstance(params, Stored | Dequantised)
    return params.shape(name) if on_disk else tuple(params[name].shape)


def _in_words(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {shape}"


def _files(directory: Path) -> dict[str, Path]:
    """The file of every stored tensor."""
    if not directory.is_dir():
        raise FileNotFoundError(f"no checkpoint directory {directory}")
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file() and index.is_file():
        raise ValueError(
            f"{directory} holds the weights twice, in {single.name} and in the shards of {index.name}: remove"
            " the older of the two"
        )
    if single.is_file():
        if shards := sorted(directory.glob("model-*-of-*.safetensors")):
            _note_unread(str(directory), shards[0].name)
        return dict.fromkeys(opened(single).keys(), single)
    if not index.is_file():
        raise FileNotFoundError(f"no {single.name} or {index.name} in {directory}{_hint(directory)}")
    weight_map = json_object(index).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise ValueError(f"{index} is truncated or corrupt; copy or download it again")
    held: dict[str, frozenset[str]] = {}
    for shard in sorted(set(weight_map.values())):
        leads_outside = Path(shard).is_absolute() or ".." in Path(shard).parts
        folder = (directory / shard).parent.resolve()  # a shard itself may be a link, as in a hub's cache
        if leads_outside or not folder.is_relative_to(directory.resolve()):
            raise ValueError(f"{index} names {shard}, which lies outside {directory}: download it again")
        if not (directory / shard).is_file():
            raise FileNotFoundError(f"{index} names {shard}, which is missing from {directory}")
        held[shard] = frozenset(opened(directory / shard).keys())
    for key, shard in weight_map.items():
        if key not in held[shard] and not BUFFER.search(key):
            raise ValueError(
                f"{index} is not that of its shards: it has {key} in {shard}, which does not hold it; copy or"
                " download them again"
            )
    files = {key: directory / shard for shard, keys in held.items() for key in keys}
    return files | {key: directory / shard for key, shard in weight_map.items() if key in files}


@cache  # once for each checkpoint
def _note_unread(directory: str, shard: str) -> None:
    log.warning(
        "%s holds shards such as %s without an index, which are not read: the weights are those in %s; remove"
        " the older of the two",
        *(directory, shard, SINGLE),
    )


def shards_in_folders(directory: Path) -> list[Path]:
    """The shards of a checkpoint that its index names in folders of its directory."""
    index = directory / INDEX
    weight_map = json_object(index).get("weight_map") if index.is_file() else None
    named = weight_map.values() if isinstance(weight_map, dict) else ()
    shards = {Path(shard) for shard in named if isinstance(shard, str)}
    inside = (
        shard
        for shard in shards
        if len(shard.parts) > 1 and not shard.is_absolute() and ".." not in shard.parts
    )
    return sorted(directory / shard for shard in inside if (directory / shard).is_file())


def _hint(directory: Path) -> str:
    """The weights that there are instead."""
    link = directory / SINGLE
    if link.is_symlink():
        return f": {link.name} is a link to {link.readlink()}, which is missing; download it again"
    if any(directory.glob("model-*.safetensors")):
        return ", only shards: copy or download the index as well"
    if inside := nested(directory):
        return f", only in folders of it: give {inside[-1]}"
    if (directory / "zero_to_fp32.py").is_file():
        return (
            ", only parts of DeepSpeed: join them with python zero_to_fp32.py . . --safe_serialization in it"
        )
    if parts := sorted(directory.glob("*/*.distcp")):
        return f", only parts of FSDP: join them with accelerate merge-weights {parts[0].parent} {directory}"
    if (directory / "adapter_config.json").is_file():
        return f", only an adapter: compare it with its base by model=pair model.after={directory}"
    others = (path for path in directory.glob("*.safetensors") if path.is_file() and path.name != SPACINGS)
    if whole := sorted(path.name for path in others):
        return f", only {whole[0]}: if it has the names of transformers' parameters, rename it to {SINGLE}"
    names = sorted(path.name for path in directory.iterdir() if path.suffix in OTHER_FORMATS)
    if pickled := [name for name in names if PICKLED.fullmatch(name)]:
        wanted = "safetensors is required, so save it again, or add ++model.allow_bin=true"
        return f", only {pickled[0]}: {wanted}"
    if other := [name for name in names if not OF_A_TRAINER.fullmatch(name)]:
        return f", only {other[0]}: {as_checkpoint(directory / other[0])}"
    return ""


def as_checkpoint(path: Path) -> str:
    """The advice for weights in a format that is not read."""
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        return (
            "load its state dict into its network, network.load_state_dict(torch.load(FILE,"
            " weights_only=True)), and give the directory of network.save_pretrained(DIRECTORY)"
        )
    if path.suffix == ".gguf":
        return f"give the file itself, {path}"
    return "give the directory of a transformers checkpoint, as network.save_pretrained(DIRECTORY) writes it"


def nested(directory: Path) -> list[Path]:
    """The checkpoints and adapters in folders of a directory, `checkpoint-9` before `checkpoint-10`."""
    configs = [*directory.glob("*/config.json"), *directory.glob("*/adapter_config.json")]
    folders = {path.parent for path in configs}
    return sorted(folders, key=lambda folder: (len(folder.name), folder.name))


def _codes(directory: Path, stored: Mapping[str, Path]) -> dict[str, Codes]:
    """The quantised weights by the names that they have on disk, without the tensors of their codes.

    Raises:
        ValueError: if a tensor is quantised in another way than those that can be read.
    """
    path = directory / "config.json"
    config = json_object(path) if path.is_file() else {}
    tensors: dict[str, tuple[str, int]] = {}
    for path in set(stored.values()):
        file = opened(path)
        for key in (key for key, place in stored.items() if place == path):
            part = file.get_slice(key)
            tensors[key] = (part.get_dtype(), len(part.get_shape()))
    codes = codes_among(config, tensors)
    read = {key for parts in codes.values() for key in (parts.codes, parts.scale)}
    rest = {
        key: tensor
        for key, tensor in tensors.items()
        if key not in read and not BUFFER.search(key) and not (codes and is_of_activations(key))
    }
    check_not_quantised(str(directory), config, rest)
    return codes


def opened(path: Path) -> "safe_open | RemoteTensors":
    """A safetensors file, mapped into memory: its tensors are views of file pages, not copies.

    Where the path stands for a remote file, its tensors are fetched when they are asked for.

    Raises:
        ConnectionError: if a remote file cannot be read.
        ValueError: if it is truncated or corrupt.
    """
    if (file := remote_file(path)) is not None:
        return remote_tensors(file)
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        if is_lfs_pointer(path):
            raise ValueError(
                f"{path} is a pointer of git-lfs, not the file: run git lfs pull in {path.parent}"
            ) from error
        raise ValueError(f"{path} is truncated or corrupt; copy or download it again ({error})") from error
