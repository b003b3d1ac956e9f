"""Which matrices read and write the residual stream, and where each lies among the parameters."""

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import import_module
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.models.experts import Stack
from weightgeom.params import Params

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


# fmt: off
Kind = Literal[
    "q", "k", "v", "attention_gate", "o", "q_a", "kv_a", "k_rope",
    "linear_q", "linear_k", "linear_v", "linear_z", "linear_b", "linear_a", "linear_o",
    "conv_B", "conv_C", "conv_x", "conv_o",
    "mamba_z", "mamba_x", "mamba_B", "mamba_C", "mamba_dt", "mamba_o",
    "gate", "up", "down", "router", "shared_gate", "shared_up", "shared_down", "shared_router",
]
# fmt: on
"""Softmax attention, also by latents of low rank; mixers of other sorts (linear attention, convolution,
Mamba-2); MLP, experts, and the expert that all tokens share."""
Block = Literal["attention", "mixer", "mlp"]
ATTENTION: frozenset[Kind] = frozenset(("q", "k", "v", "attention_gate", "o", "q_a", "kv_a", "k_rope"))
MIXER: frozenset[Kind] = frozenset(
    kind for kind in get_args(Kind) if kind.startswith(("linear_", "conv_", "mamba_"))
)
MLP: frozenset[Kind] = frozenset(
    ("gate", "up", "down", "shared_gate", "shared_up", "shared_down", "shared_router")
)
WRITES: frozenset[Kind] = frozenset(("o", "linear_o", "conv_o", "mamba_o", "down", "shared_down"))


@dataclass(frozen=True)
class Rows:
    """Rows `start : start + size` of each of `groups` blocks of `stride` rows of a fused weight.

    GPT-NeoX stores q, k and v head by head (groups = heads, stride = 3 d_head); GPT-2 and Phi-3
    store them one after the other (groups = 1).
    """

    groups: int
    stride: int
    start: int
    size: int

    def blocks(self, fused: Float[Tensor, "fused d_in"]) -> Float[Tensor, "groups size d_in"]:
        """The rows block by block, always as a view."""
        blocks = fused.unflatten(0, (self.groups, self.stride))
        return blocks[:, self.start : self.start + self.size]


@dataclass(frozen=True)
class Norm:
    """The elementwise gain of a normalisation layer: its stored weight plus `offset` (Gemma: 1)."""

    parameter: str
    offset: float = 0.0

    def gain(self, params: Params) -> Float[Tensor, " d_model"]:
        """The gain, in float32 or better: 1 + weight would lose the weight's digits in bfloat16."""
        weight = params[self.parameter]
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.offset


@dataclass(frozen=True)
class ResidualMatrix:
    """One weight matrix that reads from or writes to the residual stream.

    `heads` counts query heads for q and o and key-value groups for k and v, and the heads or groups of a
    mixer likewise: the rows of `of` (for a matrix that writes, its columns) are that many equal blocks.
    `norm` stands between the output and the stream, and the network multiplies the output by `factor` on the
    way (Granite). `expert` numbers the matrices of a mixture of experts; the router's output chooses among
    them.
    """

    layer: int
    kind: Kind
    module: str
    heads: int = 1
    rows: Rows | None = None
    transposed: bool = False
    norm: Norm | None = None
    expert: int | None = None
    factor: float = 1.0

    @property
    def parameter(self) -> str:
        """The parameter that stores the matrix, alone or fused with others."""
        return f"{self.module}.weight"

    @property
    def label(self) -> str:
        """The matrix's name within its layer, such as `q`, or `up.5` of an expert."""
        return self.kind if self.expert is None else f"{self.kind}.{self.expert}"

    @property
    def name(self) -> str:
        """The matrix's name, such as `L3.q`."""
        return f"L{self.layer}.{self.label}"

    @property
    def table_columns(self) -> dict[str, Any]:
        """The matrix's place in a result table."""
        return {"layer": self.layer, "matrix": self.kind, "expert": self.expert, "role": self.role}

    @property
    def is_layer(self) -> bool:
        """Whether its module is a layer of the network's own, which maps its input to its output.

        Experts share a module, and a router gives choices as well as its output. A shared expert is such a
        layer, as it is not chosen.
        """
        return self.expert is None and self.kind != "router"

    @property
    def role(self) -> Literal["read", "write"]:
        """Whether its input (read) or its output (write) is the residual stream."""
        return "write" if self.kind in WRITES else "read"

    @property
    def block(self) -> Block:
        """The part of its layer that it belongs to."""
        return "attention" if self.kind in ATTENTION else "mixer" if self.kind in MIXER else "mlp"

    @property
    def site(self) -> "SiteName":
        """The site of its input."""
        return INPUTS[self.block] if self.role == "read" else OWN_INPUTS[self.block]

    @property
    def has_heads(self) -> bool:
        """Whether its heads are matrices of their own."""
        return self.heads > 1 or self.kind in ("q", "k", "v", "o")

    def of(self, params: Params) -> Float[Tensor, "d_out d_in"]:
        """The matrix W in y = W a: a view, or a copy where fused head by head (GPT-NeoX)."""
        return self._blocks(params[self.parameter]).flatten(0, 1)

    def gain(self, params: Params) -> Float[Tensor, " d_out"] | None:
        """The factor of each row on the way to the stream, in float32 or better; None if there is none.

        The gain of the norm behind the matrix, if there is one, times the network's constant factor.
        """
        if self.norm is not None:
            return self.factor * self.norm.gain(params)
        if self.factor == 1:
            return None
        rows = self.of(params)[:, 0]
        return torch.full_like(rows, self.factor, dtype=torch.promote_types(rows.dtype, torch.float32))

    def written(self, params: Params) -> Float[Tensor, "d_out d_in"]:
        """The matrix as the residual stream receives it: diag(gain) W with the matrix's `gain`, or W.

        OLMo-2 and Gemma-2 add norm(W a) to the stream. The norm's gain is folded in; its
        1/rms(W a), which depends on the input and is one factor per token, is not. This folding
        is ours. It is a product of two parameters: for an update, subtract the `written` of two
        models, and do not take the `written` of their difference.
        """
        matrix, gain = self.of(params), self.gain(params)
        return matrix if gain is None else gain[:, None] * matrix

    def replaced(self, params: Params, value: Float[Tensor, "d_out d_in"]) -> Params:
        """A new dict of `params` in which this matrix is `value`, in the stored dtype.

        Nothing is mutated; the other tensors are shared, and read if `params` is lazy.

        Raises:
            ValueError: if `value` does not have the matrix's shape.
        """
        stored = params[self.parameter].clone()
        blocks = self._blocks(stored)
        expected = tuple(blocks.flatten(0, 1).shape)
        if tuple(value.shape) != expected:
            raise ValueError(f"{self.name} has shape {expected}, got a value of {tuple(value.shape)}")
        blocks.copy_(value.reshape(blocks.shape))  # a view: the write reaches `stored`
        return {**params, self.parameter: stored}

    def _blocks(self, stored: Float[Tensor, "rows columns"]) -> Float[Tensor, "groups size d_in"]:
        oriented = stored.T if self.transposed else stored
        return oriented[None] if self.rows is None else self.rows.blocks(oriented)


SiteName = Literal[
    "attention_input", "mixer_input", "mlp_input", "attention_output", "mixer_output", "mlp_hidden",
    "final_input",
]  # fmt: skip
INPUTS: Mapping[Block, SiteName] = {
    "attention": "attention_input",
    "mixer": "mixer_input",
    "mlp": "mlp_input",
}
OWN_INPUTS: Mapping[Block, SiteName] = {
    "attention": "attention_output",
    "mixer": "mixer_output",
    "mlp": "mlp_hidden",
}


@dataclass(frozen=True)
class Site:
    """A place where activations are taken: the input of `module`, a dotted path in the network.

    `attention_input` is the input of q, k and v, `mixer_input` that of a mixer of another sort, `mlp_input`
    that of gate, up and router. `attention_output`, `mixer_output` and `mlp_hidden`, which are no places of
    the residual stream, are the inputs of o, of a mixer's matrix that writes, and of down. With an `expert`,
    it is that expert's input: of the tokens that the router sends to it. At `final_input`, whose `layer` is
    the last one, `module` is the final norm, and its output is taken, which the unembedding reads.
    """

    layer: int
    name: SiteName
    module: str
    expert: int | None = None


@dataclass(frozen=True)
class Architecture:
    """The residual-stream map of one network; all parameter names are those in memory.

    `model_type` is the library's name for the type, which knows the names on disk that differ; `aliases`
    translates those of experts. `tied` says that unembedding with the embedding is the model's own choice, so
    that a missing `unembed` is no mistake. `parallel` says that attention and MLP are added to the stream in
    one sum, so that o and down of a layer share their upstream gradient. `stacks` has the parameters of
    experts, which the network holds in stacks. `inner` names matrices that lie between those of the map:
    neither their input nor their output is the residual stream. The width of a head is `d_head` or, of
    queries and keys that have another, `d_query`.
    """

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    matrices: tuple[ResidualMatrix, ...]
    sites: tuple[Site, ...]
    embed: str
    unembed: str
    final_norm: Norm
    model_type: str = field(compare=False)  # types with one map may be compared
    tied: bool = False
    parallel: bool = False
    stacks: Mapping[str, Stack] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    inner: tuple[str, ...] = ()
    d_query: int | None = None

    @property
    def final_site(self) -> Site:
        """The input of the unembedding, behind the final norm."""
        module = self.final_norm.parameter.rpartition(".")[0]
        return Site(self.sites[-1].layer, "final_input", module)

    def unembedding(self, params: Params) -> Float[Tensor, "vocab d_model"]:
        """The unembedding as stored; the embedding where the two are tied and stored once.

        Raises:
            KeyError: if the model is not tied and `params` lack the unembedding.
        """
        if self.unembed in params:
            return params[self.unembed]
        if not self.tied:
            raise KeyError(
                f"no {self.unembed} among the weights, and this model does not tie it to "
                f"{self.embed}: use a checkpoint with the language-model head"
            )
        return params[self.embed]


def input_sites(matrices: Sequence[ResidualMatrix]) -> tuple[Site, ...]:
    """The inputs of every layer's attention, mixer and MLP, as those of `first_readers`, in order.

    Experts read the input of the router's block, which, unlike the router, gets it sequence by sequence.
    """
    return tuple(
        Site(
            matrix.layer,
            matrix.site,
            matrix.module.rpartition(".")[0] if matrix.kind == "router" else matrix.module,
        )
        for matrix in first_readers(matrices)
    )


def expert_sites(matrices: Sequence[ResidualMatrix]) -> tuple[Site, ...]:
    """The inputs of every expert, layer by layer, taken at the module that all experts of a layer are in."""
    return tuple(
        Site(matrix.layer, matrix.site, matrix.module.rsplit(".", 2)[0], matrix.expert)
        for matrix in matrices
        if matrix.expert is not None and matrix.kind == "up"
    )


def first_readers(matrices: Sequence[ResidualMatrix]) -> list[ResidualMatrix]:
    """The matrix of every block that stands for its input: q, up or the router, the first of a mixer."""
    readers: dict[tuple[int, Block], ResidualMatrix] = {}
    for matrix in matrices:
        stands = matrix.kind in ("q", "q_a", "router", "up") or matrix.block == "mixer"
        if stands and matrix.role == "read" and matrix.expert is None:
            readers.setdefault((matrix.layer, matrix.block), matrix)
    return list(readers.values())


def chosen(architecture: Architecture, kinds: list[Kind], layers: list[int] | None) -> list[ResidualMatrix]:
    """The matrices of these kinds in these layers, layer by layer, for an edit of them.

    Raises:
        ValueError: for a layer or a kind that the model does not have, if no layer is named, or if one of
            the matrices is part of a mixture of experts, whose choices an edit would change.
    """
    if layers == []:
        raise ValueError("layers is empty: name some, or leave it out for all")
    if bad := [layer for layer in layers or () if not 0 <= layer < architecture.n_layers]:
        raise ValueError(f"there is no layer {bad[0]}: the model has layers 0 to {architecture.n_layers - 1}")
    known = {matrix.kind for matrix in architecture.matrices}
    if absent := [kind for kind in kinds if kind not in known]:
        raise ValueError(f"the model has no matrix {absent[0]}; it has {', '.join(sorted(known))}")
    matrices = [
        matrix
        for matrix in architecture.matrices
        if matrix.kind in kinds and (layers is None or matrix.layer in layers)
    ]
    if mixed := [matrix for matrix in matrices if not matrix.is_layer]:
        raise ValueError(
            f"{mixed[0].name} is part of a mixture of experts, which cannot be edited: leave out the kind"
            f" {mixed[0].kind}, or name layers that have no experts"
        )
    return sorted(matrices, key=lambda matrix: matrix.layer)


def text_part(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """The config of the text model in a model that also sees or hears; any other config itself.

    Whether the unembedding is tied is the whole model's choice.
    """
    if getattr(config, "text_config", None) is None:
        return config
    text = deepcopy(config.get_text_config(decoder=True))
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)
    return text


def map_module(config: "PreTrainedConfig") -> str:
    """The module that has the residual-stream map of a model."""
    return f"weightgeom.architectures.{config.model_type}"


def architecture_of(config: "PreTrainedConfig") -> Architecture:
    """The residual-stream map of a model's text part, from `weightgeom/architectures/<model_type>.py`.

    Raises:
        NotImplementedError: if there is no such file.
    """
    config = text_part(config)
    module = map_module(config)
    try:
        return import_module(module).architecture(config)
    except ModuleNotFoundError as error:
        if error.name != module:  # the file exists, and something that it imports does not
            raise
        raise NotImplementedError(
            f"no residual-stream map for {config.model_type!r}: "
            f"add a function architecture(config) in {module.replace('.', '/')}.py"
        ) from None


def module_path(architecture: Architecture, layer: int, kinds: Collection[Kind] | None = None) -> str:
    """The module of a layer, or of its attention, mixer or MLP by their kinds; empty if it has none of them.

    It is the common beginning of the names of the matrices' modules; of a layer, up to its number.
    """
    modules = [
        matrix.module.split(".")
        for matrix in architecture.matrices
        if matrix.layer == layer and (kinds is None or matrix.kind in kinds)
    ]
    common = [
        parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*modules, strict=False))
    ]
    return ".".join(common if kinds is not None else common[: common.index(str(layer)) + 1])
