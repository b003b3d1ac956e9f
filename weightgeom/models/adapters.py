"""LoRA adapters as PEFT saves them: a checkpoint that is its base plus a low-rank update."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod, sqrt
from pathlib import Path
from reprlib import repr as short
from time import monotonic
from typing import Any

import regex
import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from weightgeom.compat.conversions import renaming
from weightgeom.models.json_files import json_object
from weightgeom.models.remote import RemoteTensors
from weightgeom.models.residual import Architecture, ResidualMatrix
from weightgeom.models.vocabulary import aligned, note_rows
from weightgeom.models.weights import TEXT_MODEL, WRAPPERS, open_params, opened
from weightgeom.params import Params

log = logging.getLogger(__name__)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# A state dict that was saved without PEFT's help also has the adapter's name in its keys.
FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.[^.]+)??(?:\.weight)?")
WHOLE = re.compile(r"(.+?)(?:\.(base_layer|original_module|modules_to_save)(?:\.[^.]+)?)?\.(weight|bias)")
MATCHING = 10.0  # seconds for the patterns of one adapter
LONGEST, LARGEST = 100_000, 100_000  # characters of a pattern, and repetitions that it counts
MOST = 1e12  # an alpha, either way
# Options by which a PEFT "LoRA" is more than W + scale · B A, or not the same for every token.
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
# The other options of PEFT's LoRA, which change the training alone or are read here.
OPTIONS = (
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("bias", "fan_in_fan_out", "init_lora_weights", "modules_to_save", "ensure_weight_tying"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "qalora_group_size"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "velora_config"),
    *("megatron_config", "megatron_core", "runtime_config"),
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
        """The update of one head of `matrix`: its rows, or its columns where it writes."""
        if matrix.role == "write":
            return replace(self, a=self.a.unflatten(1, (matrix.heads, -1))[:, head])
        return replace(self, b=self.b.unflatten(0, (matrix.heads, -1))[head])


@dataclass(frozen=True, eq=False)
class Adapted(Mapping[str, Tensor]):
    """`base` with a low-rank update added to some parameters and others replaced, when asked for.

    Adapted parameters come in fp32 or better: PEFT's merge would round them to the base's dtype. `updates`
    are those of whole parameters, `transposed` names the ones that are stored transposed. Where the adapter
    unties a tied base, the unembedding is among those replaced.
    """

    base: Params
    updates: Mapping[str, LowRank]
    replaced: Mapping[str, Tensor]
    transposed: frozenset[str]

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        whole = self.replaced[name] if name in self.replaced else self.base[name]
        if name not in self.updates:
            return whole
        product = self.updates[name].b @ self.updates[name].a
        return whole.to(product.dtype) + (product.T if name in self.transposed else product)

    def __iter__(self) -> Iterator[str]:
        yield from self.base
        yield from (name for name in self.replaced if name not in self.base)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self.base or name in self.replaced

    def update_of(self, matrix: ResidualMatrix, written: bool) -> LowRank | None:
        """The update of one matrix from the base on, of rank zero where the adapter leaves it alone.

        None where the adapter replaces the matrix, or a norm that is to be folded into it.
        """
        norm = matrix.norm if written else None
        if matrix.parameter in self.replaced or (norm and norm.parameter in self.replaced):
            return None
        update = self.updates.get(matrix.parameter)
        if update is None:
            whole = matrix.of(self.base)
            float32 = whole.new_zeros(0, dtype=torch.promote_types(whole.dtype, torch.float32))
            return LowRank(float32.new_zeros(whole.shape[0], 0), float32.new_zeros(0, whole.shape[1]))
        # PEFT's factors have the orientation of y = W a, however the base is stored.
        b = replace(matrix, transposed=False).of({matrix.parameter: update.b})
        gain = matrix.gain(self.base) if written else None
        return replace(update, b=b if gain is None else gain[:, None] * b)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter instead of a whole checkpoint."""
    whole = ("model*.safetensors", "pytorch_model*.bin")
    return (directory / CONFIG).is_file() and not any(any(directory.glob(pattern)) for pattern in whole)


def open_checkpoint(directory: Path, architecture: Architecture, base: Params | None = None) -> Params:
    """The parameters of a checkpoint, read lazily; those of a LoRA adapter on top of `base`.

    Where there is a base, embeddings have its rows (`aligned`).

    Raises:
        FileNotFoundError: if the directory or one of its files is missing.
        ValueError: if a file is corrupt, the adapter is of another kind than LoRA or does not fit
            `base`, there is no base for it, or the directory holds a whole checkpoint as well.
    """
    if not is_adapter(directory):
        if any(directory.glob("adapter_model.*")):
            raise ValueError(
                f"{directory} holds both a whole checkpoint and an adapter: move the adapter_* files to a"
                " directory of their own"
            )
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
    alpha patterns, adapted embeddings and `modules_to_save` are taken as PEFT takes them. Of embeddings with
    other rows than the base's, the shared ones are taken. On a tied base, a change of the embedding or of the
    unembedding alone unties them, as in PEFT, unless the adapter says `ensure_weight_tying`.

    Raises:
        FileNotFoundError: if there are no weights in `directory`.
        ValueError: as `open_checkpoint` does.
    """
    config = _config(directory)
    content = _content(directory, config, architecture, base)
    patterns = _alpha_patterns(directory, config)
    deadline = monotonic() + MATCHING
    transposed = frozenset(m.parameter for m in architecture.matrices if m.transposed)
    updates: dict[str, LowRank] = {}
    for name, pair in content.factors.items():
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{directory / WEIGHTS} has no two matching factors lora_A and lora_B for {name}"
            )
        stored = _of_base(name, architecture, base)
        if name in (architecture.embed, architecture.unembed):
            b = _with_rows(b, torch.zeros(1, 1).expand(len(stored), b.shape[1]), name, directory)
        shape = (b.shape[0], a.shape[1])
        _check_shape(directory, name, shape[::-1] if name in transposed else shape, tuple(stored.shape))
        alpha, rank = _alpha(directory, config, patterns, content.modules[name], deadline), a.shape[0]
        scale = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
        dtype = torch.promote_types(torch.promote_types(a.dtype, stored.dtype), torch.float32)
        updates[name] = LowRank(scale * b.to(dtype), a.to(dtype))
    replaced = _replaced(content, updates, architecture, base)
    if not replaced and not any(bool(update.b.any()) for update in updates.values()):
        _note_at_its_start(str(directory))
    return Adapted(base, updates, replaced, transposed)


@dataclass(frozen=True, eq=False)
class _Content:
    """The tensors of an adapter by the base's parameters.

    `factors` are those of B A, `modules` the names that patterns match. `trained` are copies that were
    trained in place of a parameter, `stored` parameters of the base itself, such as a resized embedding.
    """

    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)
    stored: dict[str, Tensor] = field(default_factory=dict)


def _content(
    directory: Path, config: Mapping[str, Any], architecture: Architecture, base: Params
) -> _Content:
    content, file = _Content(), _weights(directory)
    given = config.get("modules_to_save")
    saved = tuple(name for name in given if isinstance(name, str)) if isinstance(given, list) else ()
    for key in file.keys():
        plain = WRAPPERS.sub("", key)
        factor, whole = FACTOR.fullmatch(plain), WHOLE.fullmatch(plain)
        module = factor[1] if factor else whole[1] if whole else plain
        parameter = f"{module}.weight" if factor or not whole else f"{module}.{whole[3]}"
        name = _name(parameter, architecture, base) if factor or whole else None
        if PREFIX not in key or name is None:
            raise ValueError(
                f"{directory / WEIGHTS} holds {key}, which is no LoRA factor or weight of the base model"
            )
        tensor = file.get_tensor(key)
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise ValueError(
                f"{directory / WEIGHTS} holds {key} of dtype {tensor.dtype}, so the adapter is quantised:"
                " save it in float32, float16 or bfloat16"
            )
        if not tensor.numel() or (factor and tensor.ndim != 2):
            raise ValueError(
                f"{directory / WEIGHTS} holds {key} of shape {tuple(tensor.shape)}, empty or partial:"
                " save the adapter again with its weights gathered (DeepSpeed ZeRO-3, FSDP)"
            )
        if factor:
            # W of an embedding has the tokens as rows, so that its update is (B A)ᵀ.
            part = {"A": "B", "B": "A"}[factor[3]] if factor[2] else factor[3]
            if part in content.factors.get(name, {}):
                raise ValueError(
                    f"{directory / WEIGHTS} holds factors of more than one adapter for {name}: save each in a"
                    " directory of its own, with PEFT's save_pretrained"
                )
            content.factors.setdefault(name, {})[part] = tensor.T if factor[2] else tensor
            content.modules[name] = module
            continue
        place = whole[2] if whole else None
        if place == "modules_to_save" or (place is None and module.endswith(saved)):
            content.trained[name] = _fitted(directory, name, tensor, architecture, base)
        elif place != "original_module" or name not in content.stored:
            content.stored[name] = _fitted(directory, name, tensor, architecture, base)
    if not content.factors and (config.get("target_modules") or not (content.trained or content.stored)):
        raise ValueError(
            f"{directory / WEIGHTS} holds no LoRA factors: save the adapter again with its weights gathered"
            " (DeepSpeed ZeRO-3, FSDP), or copy it again"
        )
    if architecture.tied and config.get("ensure_weight_tying"):
        for part in (content.factors, content.modules, content.trained):
            if architecture.embed in part:
                part.setdefault(architecture.unembed, part[architecture.embed])  # pyright: ignore
    return content


def _replaced(
    content: _Content, updates: Mapping[str, LowRank], architecture: Architecture, base: Params
) -> dict[str, Tensor]:
    """The parameters that the adapter holds whole; of a tied base also the unembedding, if it is untied."""
    embed, unembed = architecture.embed, architecture.unembed
    both = (embed, unembed)
    replaced = content.stored | content.trained
    if not architecture.tied or (unembed in base and not torch.equal(base[unembed], base[embed])):
        return replaced
    own = [content.stored[name] for name in both if name in content.stored]
    different = len(own) == 2 and not torch.equal(*own)
    if different or any(name in content.trained or name in updates for name in both):
        return dict.fromkeys(both if own else (unembed,), own[0] if own else base[embed]) | replaced
    if own:  # one parameter, which is saved under either name or both
        replaced |= dict.fromkeys(both if unembed in base else (embed,), own[0])
        replaced = {name: whole for name, whole in replaced.items() if name != unembed or unembed in base}
    return replaced


def _of_base(name: str, architecture: Architecture, base: Params) -> Float[Tensor, "..."]:
    return architecture.unembedding(base) if name == architecture.unembed else base[name]


def _fitted(
    directory: Path, name: str, tensor: Tensor, architecture: Architecture, base: Params
) -> Float[Tensor, "..."]:
    """A whole parameter, with the base's rows where it is an embedding."""
    stored = _of_base(name, architecture, base)
    if name in (architecture.embed, architecture.unembed) and tensor.ndim == stored.ndim:
        tensor = _with_rows(tensor, stored, name, directory)
    _check_shape(directory, name, tuple(tensor.shape), tuple(stored.shape))
    return tensor


def _with_rows(
    tensor: Float[Tensor, "rows _"], base: Float[Tensor, "base_rows _"], name: str, directory: Path
) -> Float[Tensor, "base_rows _"]:
    """The rows cut or filled to the base's number: shared rows first, then the base's own."""
    rows = len(base)
    if len(tensor) == rows or tensor.shape[1:] != base.shape[1:]:
        return tensor
    note_rows(str(directory), name, len(tensor), rows)
    return tensor[:rows] if len(tensor) > rows else torch.cat([tensor, base[len(tensor) :].to(tensor.dtype)])


@cache  # once for each adapter
def _note_at_its_start(directory: str) -> None:
    log.warning(
        "no matrix moved: all factors lora_B of %s are zero, as before the first step of a training",
        directory,
    )


def warn_of_other_base(directory: Path, before: str) -> None:
    """Say so in the log if an adapter names another base than the checkpoint that it is compared with."""
    named = json_object(directory / CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named.strip() or _last_part(named) == _last_part(before):
        return
    _note_other_base(str(directory), named, before)


def as_pair(directory: Path) -> str:
    """The overrides that compare an adapter with the base that it names."""
    named = json_object(directory / CONFIG).get("base_model_name_or_path")
    base = named if isinstance(named, str) and named.strip() else "BASE"
    return f"objective=none model=pair model.before={base} model.after={directory}"


def _last_part(location: str) -> str:
    """The name of a model without its owner, its revision and the place of a hub cache."""
    path = Path(location).expanduser()
    location = str(path.resolve()) if path.is_dir() else location
    cached = re.search(r"models--[^/]+--([^/]+)/snapshots/", location + "/")
    return (cached[1] if cached else location.rstrip("/").rpartition("/")[2].partition("@")[0]).lower()


@cache  # once for each adapter
def _note_other_base(directory: str, named: str, before: str) -> None:
    log.warning(
        "%s was trained on %s by its own account, and is compared with %s: check that they are the same",
        *(directory, named, before),
    )


def _config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    config = json_object(path)
    merge = "merge it into its base with PEFT's merge_and_unload and give the merged checkpoint"
    if not isinstance(kind := config.get("peft_type"), str):
        raise ValueError(
            f"{path} has no peft_type, so PEFT did not save this adapter: merge it into its base with"
            " the library that made it, such as mlx_lm.fuse for MLX, and give the merged checkpoint"
        )
    if kind != "LORA":
        raise ValueError(f"{directory} is an adapter of type {kind}, and only LORA is read: {merge}")
    bias, initial = config.get("bias", "none"), config.get("init_lora_weights", True)
    used = [f"{knob}={short(config[knob])}" for knob in VARIANTS if config.get(knob)]
    used += [f"bias={short(bias)}"] if bias != "none" else []
    used += [f"init_lora_weights={short(initial)}"] if initial not in INITIALISATIONS else []
    if not isinstance(config.get("use_rslora"), bool | None):
        raise ValueError(f"{path} has a use_rslora that is no boolean: {short(config['use_rslora'])}")
    if used:
        raise ValueError(f"{directory} is not a plain LoRA adapter ({', '.join(used)}): {merge}")
    known = (*VARIANTS, *OPTIONS)
    if unknown := [f"{name}={short(value)}" for name, value in config.items() if value and name not in known]:
        _note_options(str(path), ", ".join(unknown))
    return config


@cache  # once for each adapter
def _note_options(path: str, options: str) -> None:
    log.warning(
        "%s has options that are not known and not used (%s): check that the adapter is W + alpha / r · B A"
        " without them",
        *(path, options),
    )


def _weights(directory: Path) -> "safe_open | RemoteTensors":
    if (directory / WEIGHTS).is_file():
        return opened(directory / WEIGHTS)
    pickled = sorted(path.name for path in directory.glob("adapter_model*.bin"))
    wanted = "safetensors is required, so save it again, or add ++model.allow_bin=true"
    raise FileNotFoundError(
        f"no {WEIGHTS} in {directory}{f', only {pickled[0]}: {wanted}' if pickled else ''}"
    )


def _name(name: str, architecture: Architecture, base: Params) -> str | None:
    """The base's name for a parameter that the adapter names, if it has it."""
    name = TEXT_MODEL.sub("", name, count=1) if TEXT_MODEL.match(name) else name
    name = renaming(architecture.model_type)(name)
    if name == architecture.unembed and (architecture.tied or name in base):
        return name
    prefix = architecture.embed.partition(".")[0] + "."  # left out by adapters of the base model alone
    return next((known for known in (name, prefix + name) if known in base), None)


def _check_shape(directory: Path, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise ValueError(
            f"{directory} changes {name} by a matrix of shape {shape}, and the base's is of shape "
            f"{expected}: this adapter belongs to another base model"
        )


def _alpha_patterns(directory: Path, config: Mapping[str, Any]) -> list[tuple["regex.Pattern[str]", float]]:
    given = config.get("alpha_pattern") or {}
    if not isinstance(given, dict):
        raise ValueError(f"{directory / CONFIG} has an alpha_pattern that is no mapping: {short(given)}")
    patterns = []
    for pattern, alpha in given.items():
        try:
            if len(pattern) > LONGEST or prod(_counts(pattern)) > LARGEST:
                raise ValueError("too large")
            re.compile(pattern)  # as PEFT does: `regex` knows more, such as recursion
            compiled = regex.compile(rf"(.*\.)?({pattern})$")
        except (ValueError, re.error, regex.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{directory / CONFIG} has an alpha_pattern that is no regular expression, or a huge one:"
                f" {short(pattern)}"
            ) from error
        patterns.append((compiled, _number(directory, alpha)))
    return patterns


def _counts(pattern: str) -> Iterator[int]:
    """The repetitions that a pattern counts, such as 3 and 20 of `(a{3}){,20}`; nested ones multiply."""
    yield from (
        max(1, *map(int, re.findall(r"\d+", counted))) for counted in re.findall(r"\{[\d,]+\}", pattern)
    )


def _alpha(
    directory: Path,
    config: Mapping[str, Any],
    patterns: Sequence[tuple["regex.Pattern[str]", float]],
    module: str,
    deadline: float,
) -> float:
    """The alpha of a module: that of the first pattern that matches, else the adapter's."""
    for pattern, alpha in patterns:
        try:
            if pattern.match(module, timeout=max(1e-3, deadline - monotonic())):
                return alpha
        except TimeoutError as error:
            raise ValueError(
                f"{directory / CONFIG} has an alpha_pattern that takes too long to match,"
                f" {short(pattern.pattern)}: write the modules' names in it"
            ) from error
    return _number(directory, config.get("lora_alpha", 8))  # PEFT's default


def _number(directory: Path, alpha: object) -> float:
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) <= MOST:
        raise ValueError(f"{directory / CONFIG} has an alpha that is no number: {short(alpha)}")
    return float(alpha)
