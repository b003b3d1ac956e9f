"""Where the updates of embedding and unembedding lie in the residual stream, as wholes and token by token."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from weightgeom.estimators.other_parameters import (
    Change,
    OtherParameter,
    change_of,
    is_tied,
    other_parameters,
    parameter_rows,
    update_rows,
)
from weightgeom.estimators.reference_subspaces import FINAL, PREDICTION, Frame, Place
from weightgeom.geometry.nulls import rotation_null, spectrum_shares
from weightgeom.interfaces import Setting
from weightgeom.models.residual import Architecture
from weightgeom.models.weights import Untied
from weightgeom.params import Params
from weightgeom.table import Row, row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST = 10  # tokens with rows of their own (ours)


def sides(parameter: OtherParameter, architecture: Architecture, params: Params) -> dict[str, list[Place]]:
    """The places that the update of an embedding is compared with, by the side; none of other parameters.

    An embedding writes, at the first place that reads the stream and where the unembedding reads it; an
    unembedding reads the final input. A tied embedding does both.
    """
    first = architecture.sites[0]
    places: dict[str, list[Place]] = {}
    if parameter.kind == "embed":
        places["write"] = [PREDICTION, (first.name, first.layer)]
    if parameter.kind == "unembed" or (parameter.kind == "embed" and is_tied(architecture, params)):
        places["read"] = [FINAL]
    return places


def places_needed(architecture: Architecture) -> set[Place]:
    """The places whose frames `other_rows` takes."""
    first = architecture.sites[0]
    return {PREDICTION, (first.name, first.layer), FINAL}


def unembedding_moves(setting: Setting) -> bool:
    """Whether the unembedding is another at the end of the trajectory."""
    start, end = (setting.model.architecture.unembedding(params) for params in (setting.start, setting.end))
    return not torch.equal(start, end)


def embeddings_moved(setting: Setting, params: Params) -> bool:
    """Whether the embedding or the unembedding is another than at the start."""
    architecture = setting.model.architecture
    if not torch.equal(params[architecture.embed], setting.start[architecture.embed]):
        return True
    now, start = (architecture.unembedding(weights) for weights in (params, setting.start))
    return not torch.equal(now, start)


def other_rows(
    setting: Setting, params: Params, frames: Mapping[Place, Frame], dimensions: Sequence[int]
) -> Iterator[Row]:
    """The update of every parameter outside the residual-stream map, and where those of the embeddings lie.

    Embeddings have rows at the `frames` that there are of their `sides`.
    """
    architecture, tokenizer = setting.model.architecture, setting.model.tokenizer
    for parameter in other_parameters(setting.model, params):
        untied = parameter.kind == "unembed" and parameter.name not in setting.start
        before = Untied(setting.start, architecture) if untied else setting.start
        places = {
            role: [frames[place] for place in places if place in frames]
            for role, places in sides(parameter, architecture, params).items()
        }
        change = change_of(parameter.name, params, before, by_row=any(places.values()))
        if setting.objective is not None:  # its training starts from the stored values
            change = replace(change, rounding_share=None)
        yield from parameter_rows(parameter, change)
        for role, at in places.items():
            yield from embedding_rows(parameter, role, change, at, dimensions, setting.seed)
        yield from token_rows(parameter, places, change, params, before, dimensions, tokenizer)


def embedding_rows(
    parameter: OtherParameter,
    role: str,
    change: Change,
    frames: Sequence[Frame],
    dimensions: Sequence[int],
    seed: int,
) -> Iterator[Row]:
    """The share of an embedding's update dE, a row for each token, inside subspaces of the residual stream.

    embedding_fraction is ‖dE U‖² / ‖dE‖², embedding_ratio that over k/d, in [0, d/k]; both without unit.
    `write`: row t of dE is the update's addition to the stream at token t, compared with the prediction
    subspace, and with the first layer's input subspace. That one lies behind the first norm, whose gain is
    not folded into dE, and where a network multiplies or norms its embeddings on the way to the stream, so
    is dE compared before; a constant factor changes no ratio. `read`: logits = W_U a, so that dW_U is
    compared on its input side with the top-k eigenvectors of E[a aᵀ] of the final input a, as any matrix that
    reads. embedding_null_ratio_sd, embedding_z and embedding_p_value are those of `rotation_null`, whose mean
    ratio is 1: the singular values of dE in Haar-random directions, from the d x d Gram matrix. Source: ours,
    after the definitions of arXiv:2605.16600 for matrices.
    """
    if change.gram is None or not change.norm > 0:
        return
    gram = change.gram.cpu().double()
    d, spectrum = len(gram), spectrum_shares(change.gram.cpu())
    for frame in frames:
        inside = frame.space.shares(gram).cumsum(0)
        for asked in dimensions:
            k, fraction = frame.directions(asked), float(inside[frame.directions(asked) - 1])
            at = parameter.table_columns | {"role": role, "subspace": frame.place[0], "k": asked}
            at |= {"n": change.entries}
            null = rotation_null(spectrum, k, seed)
            yield row("embedding_fraction", fraction, **at)
            yield row("embedding_ratio", fraction * d / k, **at)
            yield row("embedding_null_ratio_sd", null.sd * d / k, **at)
            yield row("embedding_z", null.z(fraction), **at)
            p, error = null.p_value(fraction)
            yield row("embedding_p_value", p, stderr=error, **at)


def token_rows(
    parameter: OtherParameter,
    places: Mapping[str, Sequence[Frame]],
    change: Change,
    after: Params,
    before: Params,
    dimensions: Sequence[int],
    tokenizer: "PreTrainedTokenizerBase",
) -> Iterator[Row]:
    """The rows of an embedding that moved the most, each under its token's text in the column `token`.

    token_norm is ‖dE_t‖ in the units of the weights, token_relative_norm ‖dE_t‖ / ‖E_t‖ (left out where E_t
    is zero), and token_fraction ‖dE_t U‖² / ‖dE_t‖² in [0, 1], by the role and the frames of `places`; a
    random direction has k/d on average. At most ten tokens, those of the largest ‖dE_t‖.
    """
    if change.lengths is None:
        return
    most = change.lengths.topk(min(MOST, int(change.lengths.count_nonzero()))).indices.cpu()
    olds, deltas = update_rows(parameter.name, most, after, before)
    for number, old, delta in zip(most.tolist(), olds, deltas, strict=True):
        norm = float(delta.norm())
        where: dict[str, Any] = parameter.table_columns | {"token": token_text(number, tokenizer)}
        yield row("token_norm", norm, n=len(delta), **where)
        if bool(old.any()):
            yield row("token_relative_norm", norm / float(old.norm()), n=len(delta), **where)
        for role, frames in places.items():
            for frame in frames:
                inside = (frame.space.basis.T @ delta).square().cumsum(0) / delta.square().sum()
                for asked in dimensions:
                    at = where | {"role": role, "subspace": frame.place[0], "k": asked}
                    fraction = float(inside[frame.directions(asked) - 1])
                    yield row("token_fraction", fraction, n=len(delta), **at)


def token_text(number: int, tokenizer: "PreTrainedTokenizerBase") -> str:
    """A token as its tokenizer writes it, such as `Ġthe`; its number where the tokenizer does not know it."""
    token = tokenizer.convert_ids_to_tokens(number) if number < len(tokenizer) else None
    return token if isinstance(token, str) else f"#{number}"
