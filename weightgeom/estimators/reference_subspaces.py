"""Subspaces that updates are compared with: of the model's inputs, of its predictions, and random."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.compat.torch_internals import release_memory
from weightgeom.estimators.moments import Moment, Resampled, Settled, Unit, activation_moments
from weightgeom.geometry.bootstrap import FEW_TOKENS
from weightgeom.geometry.subspace import Subspace, prediction_moment
from weightgeom.interfaces import Setting
from weightgeom.models.residual import Architecture, ResidualMatrix, Site, expert_sites
from weightgeom.params import Params
from weightgeom.text.conversation import chats
from weightgeom.text.tokens import Batch, packed

log = logging.getLogger(__name__)
PER_DIMENSION = 64  # tokens for each dimension of the residual stream that moments are estimated from
WIDE = 1024  # from this width on, freed memory is given back between inputs
BATCH_TOKENS = {True: 2048, False: 16_384}  # on a CPU: more of them leave its cache
Place = tuple[str, int | None] | tuple[str, int, int]
"""The subspace's name and layer, and the expert whose tokens it is of."""
FINAL: Place = ("final_input", None)
PREDICTION: Place = ("prediction", None)


@dataclass(frozen=True, eq=False)
class Frame:
    """The top-k principal directions of one place, strongest first, with the second moment behind them.

    `resampled` are those of bootstrap samples of the prompts, each with its shares of the sample's trace;
    none where nothing is estimated from data.
    """

    place: Place
    space: Subspace
    moment: Moment | Settled | None = None
    resampled: Resampled | None = None
    crossfit: tuple[tuple[Subspace, Float[Tensor, " k"]], ...] = ()
    """The directions of each half of the prompts, with their shares of the trace of the other half."""
    rank: int | None = None  # of the directions, those with an eigenvalue above 1e-6 of the largest

    def directions(self, k: int) -> int:
        """The number of directions: k, or the rank where that is less."""
        return k if self.rank is None else max(1, min(k, self.rank))

    @property
    def per_dimension(self) -> float:
        """Tokens for each dimension behind an estimated subspace; without end where none is estimated."""
        return float("inf") if self.moment is None else self.moment.per_dimension


@dataclass(frozen=True)
class Inputs:
    """The text and the options of the second moments of the inputs."""

    tokens: int = 8192  # of held-out text
    length: int = 96  # tokens a sequence
    centre: bool = False
    unit: Unit = "token"
    dtype: torch.dtype = torch.float32
    groups: int = 16  # of sequences
    resamples: int = 0
    budget_gb: float | None = None
    text: Literal["raw", "chat"] = "raw"  # chat: by the tokenizer's chat template
    crossfit: bool = False  # also the directions of each half of the sequences
    experts: bool = False  # also of each expert's tokens
    final: bool = False  # also of the unembedding's inputs, as directions alone
    settled: bool = False  # keep of each moment its root, and no groups


def most_tokens(d: int) -> int:
    """The tokens that moments of width d are estimated from by default: 64 d, at least 8192."""
    return max(8192, PER_DIMENSION * d)


def input_moments(setting: Setting, params: Params, inputs: Inputs) -> Iterator[tuple[Site, Moment]]:
    """The second moment of every attention and mlp input of a network that has `params`, by layers.

    Use each moment before asking for the next: with a budget no more than one pass is held. With
    `inputs.experts`, a layer's moments are followed by those of its experts, each of the tokens that the
    router sends to it; an expert that gets none has no moment. With `inputs.final` the last one is that of
    the unembedding's inputs: the output of the final norm, its gain and bias included.
    """
    model = setting.model
    sites = model.architecture.sites
    if inputs.experts:
        of_experts = expert_sites(model.architecture.matrices)
        sites = sorted((*sites, *of_experts), key=lambda site: site.layer)
    experts = len(sites) - len(model.architecture.sites)
    if inputs.final:
        sites = [*sites, model.architecture.final_site]
    moments = activation_moments(
        model,
        params,
        text_batches(setting, inputs, inputs.tokens),
        sites,
        centre=inputs.centre,
        unit=inputs.unit,
        dtype=inputs.dtype,
        groups=inputs.groups if inputs.resamples else 1,
        budget_gb=inputs.budget_gb,
    )
    routed: dict[Site, float] = {}  # tokens per dimension of experts
    for site, moment in moments:
        d = moment.sums.shape[1]
        if d >= WIDE:
            release_memory()  # of the pass
        if site.expert is not None:
            routed[site] = moment.per_dimension
        elif inputs.unit == "token":
            _warn_of_few(moment.samples, inputs.tokens, d)
        handed_over = [(site, moment)]
        del moment  # which is large: only the caller keeps it
        yield handed_over.pop()
    few = sorted(
        (per, f"expert {site.expert} of layer {site.layer}")
        for site, per in routed.items()
        if per < FEW_TOKENS
    )
    if few:
        _warn_of_few_routed(len(few), experts, *few[0])
    if len(routed) < experts:
        _warn_of_unreached(experts - len(routed), experts)


def input_frames(setting: Setting, params: Params, k: int, inputs: Inputs) -> Iterator[Frame]:
    """The frame of every moment of `input_moments`, in its order. Use each before asking for the next."""
    for site, moment in input_moments(setting, params, inputs):
        d = moment.sums.shape[1]
        crossfit = tuple(_crossfit(moment, k)) if inputs.crossfit and site.name != "final_input" else ()
        space, rank = top_directions(site, moment, k)
        if site.name == "final_input":
            yield Frame(FINAL, space, rank=rank)
            continue
        place = (site.name, site.layer) if site.expert is None else (site.name, site.layer, site.expert)
        resampled = None
        if inputs.resamples:
            resampled = moment.resampled_tops(k, inputs.resamples, setting.seed, drop=inputs.settled)
        settled = moment.settled() if inputs.settled else moment
        frame = Frame(place, space, settled, resampled, crossfit, rank)
        del moment, settled, resampled  # a moment is large
        if d >= WIDE:
            release_memory()  # of the moment
        yield frame
        del frame


def top_directions(site: Site, moment: Moment, k: int) -> tuple[Subspace, int]:
    """The top k directions of an input's moment, and how many of them have more than 1e-6 of the largest."""
    space = moment.top(k)
    shares = space.shares(moment.value.cpu().double())
    rank = int((shares > 1e-6 * shares.max()).sum())  # fp32 sums do not tell less from zero
    if rank < k and site.expert is None and site.name != "final_input":
        _warn_of_rank(rank, k, f"the {site.name.replace('_', ' ')} of layer {site.layer}")
    return space, rank


def text_batches(setting: Setting, inputs: Inputs, tokens: int) -> list[Batch]:
    """The held-out text, or conversations, that moments of inputs are taken on: at most `tokens` tokens."""
    model = setting.model
    size = max(1, BATCH_TOKENS[model.device.type == "cpu"] // inputs.length)
    chat = inputs.text == "chat"
    texts = chats(setting.examples, model.tokenizer) if chat else setting.examples.heldout
    return packed(texts, model.tokenizer, inputs.length, tokens, size, closed=chat)


def _crossfit(moment: Moment, k: int) -> Iterator[tuple[Subspace, Float[Tensor, " k"]]]:
    """Directions of one half with their shares of the other's trace, both ways; none without two groups.

    The shares of the moment that a subspace was estimated from are too large, the more so the fewer tokens.
    """
    halves = None if moment.centred else moment.halves()
    if halves is None:
        return
    for half, other in (halves, halves[::-1]):
        space = Subspace.top(half.value.cpu(), k)
        yield space, space.shares(other.value.cpu())


@cache
def _warn_of_few(tokens: int, asked: int, d: int) -> None:
    """Say, once in a process, that there are fewer tokens than asked for, or than moments need."""
    per = tokens / d
    if tokens >= asked and per >= FEW_TOKENS:
        return
    message = "%d tokens of held-out text, of %d asked for: %.1f tokens per dimension (d = %d)"
    if per < FEW_TOKENS:
        log.warning(
            "too few tokens for the subspaces of the inputs: "
            + message
            + "; their intervals are widened, and"
            " below 1 most directions are arbitrary: give more held-out text",
            *(tokens, asked, per, d),
        )
    else:
        log.info(message, *(tokens, asked, per, d))


@cache
def _warn_of_few_routed(few: int, experts: int, per: float, fewest: str) -> None:
    log.warning(
        "%d of %d experts get fewer than %d tokens per dimension, the fewest %.1f (%s): their intervals are"
        " widened, and below 1 most directions are arbitrary: see the rows tokens_per_dimension and"
        " directions, and give more held-out text",
        *(few, experts, FEW_TOKENS, per, fewest),
    )


@cache
def _warn_of_unreached(unreached: int, experts: int) -> None:
    log.warning(
        "%d of %d experts get no token of the held-out text: their reads have no subspace and no ratio; give"
        " more held-out text",
        *(unreached, experts),
    )


@cache
def _warn_of_rank(rank: int, k: int, place: str) -> None:
    log.warning(
        "%s has only %d directions, fewer than k = %d: what follows them is arbitrary and is left out of the"
        " subspace; give more varied held-out text, or a k of at most %d",
        *(place, rank, k, rank),
    )


def prediction_frame(
    setting: Setting, params: Params, k: int, *, fold_gain: bool = True, centre: bool = True
) -> Frame:
    """The frame of the unembedding, as `prediction_moment` has it; not estimated from data."""
    architecture = setting.model.architecture
    gain = architecture.final_norm.gain(params)
    gram = prediction_moment(architecture.unembedding(params), gain, fold_gain=fold_gain, centre=centre)
    return Frame(PREDICTION, Subspace.top(gram.cpu(), k))


def random_frame(setting: Setting, k: int) -> Frame:
    """A Haar-uniform subspace that the run's seed draws."""
    generator = torch.Generator().manual_seed(setting.seed)
    return Frame(("random", None), Subspace.random(setting.model.architecture.d_model, k, generator))


def place_of(matrix: ResidualMatrix) -> Place:
    """Where the residual side of a matrix is compared: its own input, or the prediction subspace."""
    if matrix.role == "write":
        return PREDICTION
    return matrix.site, matrix.layer


def routed_place_of(matrix: ResidualMatrix) -> Place:
    """As `place_of`, but an expert's input has a place of its own: that of the tokens sent to it."""
    if matrix.role == "write" or matrix.expert is None:
        return place_of(matrix)
    return matrix.site, matrix.layer, matrix.expert


def in_walk(
    frames: Iterable[Frame], architecture: Architecture
) -> Iterator[tuple[Frame, list[ResidualMatrix]]]:
    """Every frame with the matrices that are compared with it, layer by layer.

    The frame of the predictions must be the first. It comes again behind the last inputs of each layer, with
    the matrices of that layer which write: by then a walk has read the layer's weights, and no others since.
    """
    last: dict[int | None, Place] = {site.layer: (site.name, site.layer) for site in architecture.sites}
    inputs = iter(frames)
    prediction = next(inputs)
    yield prediction, []
    for frame in inputs:
        yield frame, [matrix for matrix in architecture.matrices if routed_place_of(matrix) == frame.place]
        layer = frame.place[1]
        if last.get(layer) == frame.place:
            written = (matrix for matrix in architecture.matrices if matrix.layer == layer)
            yield prediction, [matrix for matrix in written if matrix.role == "write"]
        del frame  # before the next sums are made


def dimensions(k: int | list[int] | None, d: int) -> list[int]:
    """The subspace dimensions asked for, in ascending order; d/8 (ours) where none is."""
    return sorted({max(1, d // 8)} if k is None else {k} if isinstance(k, int) else set(k))


def check_dimensions(k: int | list[int] | None, d: int, key: str) -> None:
    """Raise ValueError for a k that does not fit."""
    wanted = dimensions(k, d)
    if not wanted or wanted[0] < 1 or wanted[-1] > d:
        raise ValueError(f"{key} must be 1 to {d}, the width of the residual stream, got {k}")
