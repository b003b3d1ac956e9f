"""Subspaces that updates are compared with: of what a model reads, of what it predicts, and random."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.estimators.moments import Moment, Unit, activation_moments
from weightgeom.geometry.subspace import Subspace, prediction_moment
from weightgeom.interfaces import Setting
from weightgeom.models.residual import ResidualMatrix
from weightgeom.params import Params
from weightgeom.text.conversation import chats
from weightgeom.text.tokens import packed

BATCH_TOKENS = {True: 2048, False: 16_384}  # on a CPU: more of them leave its cache
Place = tuple[str, int | None]  # the subspace's name and layer


@dataclass(frozen=True, eq=False)
class Frame:
    """The top-k principal directions of one place, strongest first, with the second moment behind them.

    `resampled` are those of bootstrap samples of the prompts, each with its shares of the sample's trace;
    none where nothing is estimated from data.
    """

    place: Place
    space: Subspace
    moment: Moment | None = None
    resampled: tuple[tuple[Subspace, Float[Tensor, " k"]], ...] = ()


@dataclass(frozen=True)
class Inputs:
    """On what, and how, the second moments of the inputs are taken."""

    tokens: int = 8192  # of held-out text
    length: int = 96  # tokens a sequence
    centre: bool = False
    unit: Unit = "token"
    dtype: torch.dtype = torch.float32
    groups: int = 16  # of sequences
    resamples: int = 0
    budget_gb: float | None = None
    text: Literal["raw", "chat"] = "raw"  # chat: by the tokenizer's chat template


def input_frames(setting: Setting, params: Params, k: int, inputs: Inputs) -> Iterator[Frame]:
    """The frame of every attention and mlp input of a network that has `params`, in the order of the layers.

    Take what is yielded before asking for more: with a budget no more than one pass is held.
    """
    model = setting.model
    size = max(1, BATCH_TOKENS[model.device.type == "cpu"] // inputs.length)
    chat = inputs.text == "chat"
    texts = chats(setting.examples, model.tokenizer) if chat else setting.examples.heldout
    batches = packed(texts, model.tokenizer, inputs.length, inputs.tokens, size, closed=chat)
    moments = activation_moments(
        model,
        params,
        batches,
        model.architecture.sites,
        centre=inputs.centre,
        unit=inputs.unit,
        dtype=inputs.dtype,
        groups=inputs.groups if inputs.resamples else 1,
        budget_gb=inputs.budget_gb,
    )
    for site, moment in moments:
        drawn = moment.resampled_tops(k, inputs.resamples, setting.seed) if inputs.resamples else ()
        yield Frame(
            (site.name, site.layer),
            moment.top(k),
            moment,
            tuple(drawn),
        )


def prediction_frame(
    setting: Setting, params: Params, k: int, *, fold_gain: bool = True, centre: bool = True
) -> Frame:
    """The frame of the unembedding, as `prediction_moment` has it; not estimated from data."""
    architecture = setting.model.architecture
    gain = architecture.final_norm.gain(params)
    gram = prediction_moment(architecture.unembedding(params), gain, fold_gain=fold_gain, centre=centre)
    return Frame(("prediction", None), Subspace.top(gram.cpu(), k))


def random_frame(setting: Setting, k: int) -> Frame:
    """A Haar-uniform subspace that the run's seed draws."""
    generator = torch.Generator().manual_seed(setting.seed)
    return Frame(("random", None), Subspace.random(setting.model.architecture.d_model, k, generator))


def place_of(matrix: ResidualMatrix) -> Place:
    """Where the residual side of a matrix is compared: its own input, or the prediction subspace."""
    if matrix.role == "write":
        return "prediction", None
    return "attention_input" if matrix.kind in ("q", "k", "v") else "mlp_input", matrix.layer


def dimensions(k: int | list[int] | None, d: int) -> list[int]:
    """The subspace dimensions asked for, in ascending order; d/8 (ours) where none is."""
    return sorted({max(1, d // 8)} if k is None else {k} if isinstance(k, int) else set(k))


def check_dimensions(k: int | list[int] | None, d: int, key: str) -> None:
    """Raise ValueError for a k that does not fit."""
    wanted = dimensions(k, d)
    if not wanted or wanted[0] < 1 or wanted[-1] > d:
        raise ValueError(f"{key} must be 1 to {d}, the width of the residual stream, got {k}")
