"""Updates of the parameters outside the residual-stream map: embeddings, norms, biases and others."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from weightgeom.estimators.updates import BLOCK, is_rounded, rounding_energy
from weightgeom.geometry.gram import add_gram, mirror
from weightgeom.models.adapters import Adapted, LowRank
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import Architecture, module_path
from weightgeom.models.spacing import spacing_of
from weightgeom.models.weights import shape_of
from weightgeom.params import Params
from weightgeom.table import Row, row


@dataclass(frozen=True)
class OtherParameter:
    """A parameter outside the residual-stream map.

    `kind` is `embed`, `unembed`, `position` (an embedding of positions), `norm` (a gain), `bias`, `conv`,
    `inner` (a matrix whose two sides are both inside a layer), or the last part of its name, such as `A_log`
    or `sinks`. `layer` is None outside the layers.
    """

    name: str
    kind: str
    layer: int | None

    @property
    def table_columns(self) -> dict[str, Any]:
        """The parameter's place in a result table."""
        return {"layer": self.layer, "matrix": self.kind, "parameter": self.name}


@dataclass(frozen=True, eq=False)
class Change:
    """The update of one parameter, with the figures that `parameter_rows` reports.

    Of an embedding, `gram` is dEᵀ dE and `lengths` are the norms ‖dE_t‖ of its rows; None of others.
    """

    entries: int
    norm: float
    before_norm: float
    moved_share: float
    visible_share: float
    rounding_share: float | None
    gram: Float[Tensor, "d d"] | None = None
    lengths: Float[Tensor, " token"] | None = None


def other_parameters(model: LanguageModel, params: Params) -> list[OtherParameter]:
    """Every parameter of `params` that no residual matrix lies in, in the network's order.

    A tied unembedding is the embedding, which is listed once, also where `params` have it by both names.
    """
    architecture = model.architecture
    covered = {matrix.parameter for matrix in architecture.matrices} | set(architecture.stacks)
    if is_tied(architecture, params):
        covered.add(architecture.unembed)
    order = {name: place for place, name in enumerate(model.network.state_dict())}
    names = sorted(params.keys() - covered, key=lambda name: (order.get(name, len(order)), name))
    return [OtherParameter(name, _kind(name, model, params), layer_of(name, architecture)) for name in names]


def is_tied(architecture: Architecture, params: Params) -> bool:
    """Whether the unembedding is the embedding."""
    embed, unembed = architecture.embed, architecture.unembed
    return architecture.tied and (unembed not in params or torch.equal(params[unembed], params[embed]))


def layer_of(name: str, architecture: Architecture) -> int | None:
    """The layer that a parameter belongs to, by its name."""
    first = architecture.matrices[0].layer
    layers = module_path(architecture, first).removesuffix(str(first))
    number = name.removeprefix(layers).partition(".")[0]
    return int(number) if name.startswith(layers) and number.isdigit() else None


def _kind(name: str, model: LanguageModel, params: Params) -> str:
    architecture = model.architecture
    module, _, last = name.rpartition(".")
    if name in (architecture.embed, architecture.unembed):
        return "embed" if name == architecture.embed else "unembed"
    if name in architecture.inner:
        return "inner"
    if last != "weight":
        return "bias" if last.endswith("bias") else last
    if isinstance(model.network.get_submodule(module), nn.Embedding):
        return "position"
    return {1: "norm", 3: "conv"}.get(len(shape_of(params, name) or ()), "inner")


def change_of(name: str, after: Params, before: Params, *, by_row: bool = False) -> Change:
    """The update of one parameter, in blocks of 4 MiB, subtracted in fp32 or better.

    `by_row` also takes the Gram matrix and the norms of its rows. The update of a LoRA adapter of an
    embedding comes from its factors, as that of a matrix does.

    Raises:
        ValueError: if the two shapes differ, or the update has an entry that is not finite.
    """
    moved = visible = entries = 0
    energy = old_energy = noise = 0.0
    rounded, gram, lengths = False, None, []
    for new, old, delta, stored in _blocks(name, after, before):
        entries += delta.numel()
        moved += int(delta.count_nonzero())
        visible += int((new.bfloat16() != old.bfloat16()).sum())
        old_energy += _energy(old)
        squares = delta.double().square().sum(1)
        energy += float(squares.sum())
        for weight, spacing in stored:
            rounded |= spacing is not None or is_rounded(weight)
            noise += rounding_energy(weight, spacing=spacing)
        if by_row:
            gram = delta.new_zeros(delta.shape[1], delta.shape[1]) if gram is None else gram
            add_gram(gram, delta.T)
            lengths.append(squares.sqrt())
    if not isfinite(energy):
        raise ValueError(
            f"the update of {name} has entries that are not finite: one of the two checkpoints is corrupt or"
            " diverged"
        )
    if gram is not None:
        mirror(gram)
    return Change(
        entries,
        sqrt(energy),
        sqrt(old_energy),
        moved / entries,
        visible / entries,
        (min(1.0, noise / energy) if energy else 0.0) if rounded else None,
        gram,
        torch.cat(lengths) if by_row else None,
    )


def update_rows(
    name: str, numbers: Int[Tensor, " row"], after: Params, before: Params
) -> tuple[Float[Tensor, "row d"], Float[Tensor, "row d"]]:
    """Some rows of a parameter before, and of its update; in fp64."""
    old = before[name][numbers].cpu().double()
    if (factors := _factors(name, after, before)) is not None:
        return old, (factors.b[numbers].double() @ factors.a.double()).cpu()
    return old, after[name][numbers].cpu().double() - old


def parameter_rows(parameter: OtherParameter, change: Change) -> Iterator[Row]:
    """The size of a parameter's update dw, without a pathway (`role` is empty).

    delta_norm ‖dw‖ in the units of the weights; relative_norm ‖dw‖ / ‖w‖ with w the parameter before, left
    out where it is zero; moved_share, the share of entries of dw that are not zero, as of residual matrices;
    visible_share, the share of entries whose values rounded to bf16 differ: what the update of fp32
    weights leaves when both checkpoints are saved in bf16 (arXiv:2511.08567 counts its complement);
    rounding_share, the share of ‖dw‖² that rounding of the stored values alone would give, of checkpoints in
    half precision and quantised ones.
    """
    where, n = parameter.table_columns, change.entries
    yield row("delta_norm", change.norm, n=n, **where)
    if change.before_norm > 0:
        yield row("relative_norm", change.norm / change.before_norm, n=n, **where)
    yield row("moved_share", change.moved_share, n=n, **where)
    yield row("visible_share", change.visible_share, n=n, **where)
    if change.rounding_share is not None:
        yield row("rounding_share", change.rounding_share, n=n, **where)


Stored = tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows columns"] | None]
"""A block as it is stored, and the spacings of its grid where it is quantised."""


def _blocks(
    name: str, after: Params, before: Params
) -> Iterator[
    tuple[
        Float[Tensor, "rows columns"],
        Float[Tensor, "rows columns"],
        Float[Tensor, "rows columns"],
        list[Stored],
    ]
]:
    """Blocks of rows of a parameter after and before, their difference, and the stored values behind them."""
    old = as_matrix(before[name])
    if (factors := _factors(name, after, before)) is not None:
        for part in _parts(old):
            delta = factors.b[part] @ factors.a
            yield old[part].to(delta.dtype) + delta, old[part], delta, []
        return
    new = as_matrix(after[name])
    if new.shape != old.shape:
        raise ValueError(
            f"{name} is of shape {tuple(new.shape)} after and of shape {tuple(old.shape)} before: take two"
            " checkpoints of one architecture"
        )
    grids = [spacing_of(params, name) for params in (after, before)]
    dtype = torch.promote_types(torch.promote_types(new.dtype, old.dtype), torch.float32)
    for part in _parts(old):
        spacings = [None if grid is None else as_matrix(grid)[part] for grid in grids]
        stored = list(zip((new[part], old[part]), spacings, strict=True))
        yield new[part], old[part], new[part].to(dtype) - old[part].to(dtype), stored


def _parts(matrix: Float[Tensor, "rows columns"]) -> Iterator[slice]:
    rows = max(1, BLOCK // matrix.shape[1])
    yield from (slice(start, start + rows) for start in range(0, len(matrix), rows))


def _factors(name: str, after: Params, before: Params) -> LowRank | None:
    """The factors of an adapter's update of an embedding or an inner matrix from its own base on."""
    if not isinstance(after, Adapted) or after.base is not before or name in after.replaced:
        return None
    return after.updates.get(name)


def as_matrix(tensor: Float[Tensor, "..."]) -> Float[Tensor, "rows columns"]:
    """A tensor of any shape as a matrix; of a vector or a number, one row."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)


def _energy(x: Float[Tensor, "rows columns"]) -> float:
    return float(x.double().square().sum())
