"""LoRA adapters as PEFT saves them: a checkpoint that is its base plus a low-rank update."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from weightgeom.models.residual import Architecture, ResidualMatrix
from weightgeom.models.vocabulary import aligned
from weightgeom.models.weights import open_params, opened
from weightgeom.params import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")
# What makes a PEFT "LoRA" more than W + scale · B A, or not the same for every token.
VARIANTS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# The other initialisations (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base as well.
INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, eq=False)
class LowRank:
    """An update dW = B A of one matrix, kept as its two factors."""

    b: Float[Tensor, "d_out r"]
    a: Float[Tensor, "r d_in"]

    def gram(self, read: bool) -> Float[Tensor, "d d"]:
        """dWᵀ dW = Aᵀ (Bᵀ B) A where the matrix reads, dW dWᵀ = B (A Aᵀ) Bᵀ where it writes."""
        outer, inner = (self.a.T, self.b) if read else (self.b, self.a.T)
        return (outer @ (inner.T @ inner)) @ outer.T

    def head(self, head: int, matrix: ResidualMatrix) -> "LowRank":
        """The update of one head of `matrix`: its rows, or its columns where the matrix is o."""
        if matrix.kind == "o":
            return replace(self, a=self.a.unflatten(1, (matrix.heads, -1))[:, head])
        return replace(self, b=self.b.unflatten(0, (matrix.heads, -1))[head])


@dataclass(frozen=True, eq=False)
class Adapted(Mapping[str, Tensor]):
    """`base` with a low-rank update added to some parameters and others replaced, when asked for.

    Adapted parameters come in fp32 or better: PEFT's merge would round them to the base's dtype.
    `updates` are those of whole parameters, `transposed` names the ones that are stored transposed.
    """

    base: Params
    updates: Mapping[str, LowRank]
    replaced: Mapping[str, Tensor]
    transposed: frozenset[str]

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        if name in self.replaced or name not in self.updates:
            return self.replaced[name] if name in self.replaced else self.base[name]
        update, stored = self.updates[name], self.base[name]
        product = update.b @ update.a
        return stored.to(product.dtype) + (product.T if name in self.transposed else product)

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def __contains__(self, name: object) -> bool:
        return name in self.base

    def update_of(self, matrix: ResidualMatrix, written: bool) -> LowRank | None:
        """The update of one matrix from the base on, of rank zero where the adapter leaves it alone.

        None where the adapter replaces the matrix, or a norm that is to be folded into it.
        """
        folded = matrix.norm if written else None
        if matrix.parameter in self.replaced or (folded and folded.parameter in self.replaced):
            return None
        update = self.updates.get(matrix.parameter)
        if update is None:
            whole = matrix.of(self.base)
            float32 = whole.new_zeros(0, dtype=torch.promote_types(whole.dtype, torch.float32))
            return LowRank(float32.new_zeros(whole.shape[0], 0), float32.new_zeros(0, whole.shape[1]))
        # PEFT's factors have the orientation of y = W a, however the base is stored.
        b = replace(matrix, transposed=False).of({matrix.parameter: update.b})
        return replace(update, b=b if folded is None else folded.gain(self.base)[:, None] * b)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter instead of a whole checkpoint."""
    return (directory / CONFIG).is_file() and not any(directory.glob("model*.safetensors"))


def open_checkpoint(directory: Path, architecture: Architecture, base: Params | None = None) -> Params:
    """The parameters of a checkpoint, read lazily; those of a LoRA adapter on top of `base`.

    Where there is a base, embeddings have its rows (`aligned`).

    Raises:
        FileNotFoundError: if the directory or a file of it is missing.
        ValueError: if a file is corrupt, the adapter is of another kind than LoRA or does not fit
            `base`, or there is no base for it.
    """
    if not is_adapter(directory):
        params = open_params(directory, architecture)
        return params if base is None else aligned(params, base, architecture, directory)
    if base is None:
        raise ValueError(
            f"{directory} is an adapter, which has no weights of its own: compare it with its base"
        )
    return open_adapter(directory, architecture, base)


def open_adapter(directory: Path, architecture: Architecture, base: Params) -> Adapted:
    """A LoRA adapter on top of `base`, W + scale · B A.

    The scale is alpha / r or, where the adapter is rank-stabilised, alpha / √r. Layout: PEFT's
    `adapter_config.json` and `adapter_model.safetensors`; fused and transposed weights, rank and
    alpha patterns and `modules_to_save` are taken as PEFT takes them.

    Raises:
        FileNotFoundError: if there are no weights in `directory`.
        ValueError: as `open_checkpoint` does.
    """
    config = _config(directory)
    factors: dict[str, dict[str, Tensor]] = {}
    modules: dict[str, str] = {}
    replaced: dict[str, Tensor] = {}
    file = _weights(directory)
    for key in file.keys():
        factor = FACTOR.fullmatch(key.removeprefix(PREFIX))
        module = factor[1] if factor else key.removeprefix(PREFIX).rpartition(".")[0]
        name = _name(f"{module}.weight" if factor else key.removeprefix(PREFIX), architecture, base)
        if not key.startswith(PREFIX) or name is None:
            raise ValueError(
                f"{directory / WEIGHTS} holds {key}, which is no LoRA factor or weight of the base model"
            )
        if factor:
            factors.setdefault(name, {})[factor[2]] = file.get_tensor(key)
            modules[name] = module
        else:
            replaced[name] = file.get_tensor(key)
            _check_shape(directory, name, tuple(replaced[name].shape), base)
    transposed = frozenset(m.parameter for m in architecture.matrices if m.transposed)
    updates: dict[str, LowRank] = {}
    for name, pair in factors.items():
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{directory / WEIGHTS} has no two matching factors lora_A and lora_B for {name}"
            )
        shape = (b.shape[0], a.shape[1])
        _check_shape(directory, name, shape[::-1] if name in transposed else shape, base)
        alpha, rank = _alpha(config, modules[name]), a.shape[0]
        scale = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
        dtype = torch.promote_types(torch.promote_types(a.dtype, base[name].dtype), torch.float32)
        updates[name] = LowRank(scale * b.to(dtype), a.to(dtype))
    return Adapted(base, updates, replaced, transposed)


def _config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text())
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is truncated or corrupt; copy or download it again") from error
    merge = "merge it into its base with PEFT's merge_and_unload and give the merged checkpoint"
    if kind != "LORA":
        raise ValueError(f"{directory} is an adapter of type {kind}, and only LORA is read: {merge}")
    bias, initial = config.get("bias", "none"), config.get("init_lora_weights", True)
    used = [f"{knob}={config[knob]!r}" for knob in VARIANTS if config.get(knob)]
    used += [f"bias={bias!r}"] if bias != "none" else []
    used += [f"init_lora_weights={initial!r}"] if initial not in INITIALISATIONS else []
    if used:
        raise ValueError(f"{directory} is not a plain LoRA adapter ({', '.join(used)}): {merge}")
    return config


def _weights(directory: Path) -> safe_open:
    if (directory / WEIGHTS).is_file():
        return opened(directory / WEIGHTS)
    pickled = sorted(path.name for path in directory.glob("adapter_model*.bin"))
    hint = f", only {pickled[0]}: safetensors is required, so save it again" if pickled else ""
    raise FileNotFoundError(f"no {WEIGHTS} in {directory}{hint}")


def _name(name: str, architecture: Architecture, base: Params) -> str | None:
    """The base's name for a parameter that the adapter names, if it has it."""
    name = architecture.aliases.get(name, name)
    prefix = architecture.embed.partition(".")[0] + "."  # left out by adapters of the base model alone
    return next((known for known in (name, prefix + name) if known in base), None)


def _check_shape(directory: Path, name: str, shape: tuple[int, ...], base: Params) -> None:
    expected = tuple(base[name].shape)
    if shape != expected:
        raise ValueError(
            f"{directory} changes {name} by a matrix of shape {shape}, and the base's is of shape "
            f"{expected}: this adapter belongs to another base model"
        )


def _alpha(config: dict[str, Any], module: str) -> float:
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(alpha)
    return float(config.get("lora_alpha", 8))  # PEFT's default
