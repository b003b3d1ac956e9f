"""Streaming moments under an objective: inputs, upstream gradients, mean and squared gradient, in a pass."""

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from weightgeom.estimators.lm_head import slice_head
from weightgeom.estimators.moments import (
    GIB,
    Accumulator,
    Moment,
    Samples,
    Unit,
    check_finite,
    group_of,
    passes,
)
from weightgeom.estimators.reference_subspaces import PREDICTION, Place
from weightgeom.geometry.bootstrap import bootstrap_times
from weightgeom.geometry.subspace import Subspace
from weightgeom.interfaces import Objective, OnPolicy, Scored
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import Architecture, ResidualMatrix, Site
from weightgeom.models.weights import shape_of
from weightgeom.params import Params
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training
from weightgeom.training.fit import outdated_name_allowed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
EPSILON = 1e-8  # of AdamW in torch and transformers: added to the root
VALUES = 20  # of d_model that a layer keeps of a token for its backward pass, about (ours)
CHARACTERS = 10  # of a text for each wanted token: more than the tokens of any tokenizer have


@dataclass(frozen=True, eq=False)
class MeanGradient:
    """G = E[δ aᵀ] of one parameter as it is stored: the gradient of the mean loss, by group of prompts.

    `sums` holds Σ δ aᵀ over the tokens of each group, `terms` the number of terms in the group's loss.
    `squares` is the mean over training batches of the squared entries of a batch's gradient. `rows` and
    `columns` are the mean squares of the two factors over all tokens, δ and a, or a and δ where the
    parameter is stored transposed.
    """

    sums: Float[Tensor, "group rows columns"]
    terms: Float[Tensor, " group"]
    squares: Float[Tensor, "rows columns"]
    rows: Float[Tensor, " rows"]
    columns: Float[Tensor, " columns"]

    @property
    def value(self) -> Float[Tensor, "rows columns"]:
        """The gradient of the mean loss."""
        return self.drawn(torch.ones_like(self.terms))

    @property
    def adam(self) -> Float[Tensor, "rows columns"]:
        """Adam's average divisor of a gradient: √(mean squared batch gradient) + EPSILON.

        Source: arXiv:1412.6980, Algorithm 1, with expectations for the running means.
        """
        return self.squares.sqrt() + EPSILON

    @property
    def kronecker(self) -> Float[Tensor, "rows columns"]:
        """The root of the product of the factors' mean squares: infinite where one of them is always 0.

        It is proportional to `adam` where tokens are uncorrelated and their factors' squares independent,
        and needs two vectors only. G over it is D_δ^(-1/2) G D_a^(-1/2).
        """
        root = torch.outer(self.rows.sqrt(), self.columns.sqrt())
        return root.masked_fill(root == 0, float("inf"))

    def drawn(self, times: Float[Tensor, " group"]) -> Float[Tensor, "rows columns"]:
        """The gradient for a sample in which each group occurs this many times."""
        times = times.to(self.sums)
        return torch.einsum("g,gij->ij", times, self.sums) / (times @ self.terms.to(times))

    def resampled(self, resamples: int, seed: int) -> Iterator[Float[Tensor, "rows columns"]]:
        """The gradient for the bootstrap samples of the groups that `Moment.resampled` takes."""
        for times in bootstrap_times(len(self.sums), resamples, seed):
            yield self.drawn(times)


@dataclass(frozen=True, eq=False)
class Pass:
    """The sums of one pass over some of the layers.

    `inputs` has C_a = E[a aᵀ] by site; `upstream` C_delta = E[δ δᵀ] by the name of the o or down at whose
    output it is taken, one object for both in a parallel block; `gradients` G by parameter. `others` has, by
    the name of a matrix, the sums of the other factor than the one in these moments: of δ for a matrix that
    reads, of a for one that writes.
    """

    layers: Sequence[int]
    inputs: dict[Site, Moment]  # to take moments out of, one by one
    upstream: dict[str, Moment]
    gradients: Mapping[str, MeanGradient]
    prompts: int
    others: Mapping[str, "Diagonal"]


@dataclass(frozen=True)
class Gathering:
    """The quantities to accumulate, the number of prompts, and the options.

    `positions` are those whose next token the objective scores, or all but padding, for C_a and
    C_delta; G is over all of them in any case, as it is the gradient of the weights. By `unit` a sample
    is a token, or a prompt with all its responses: the mean of its inputs, the sum of its upstream
    gradients. `budget_gb` is in GiB, for the sums.
    """

    prompts: int = 256
    inputs: bool = True
    upstream: bool = True
    gradients: bool = True
    positions: Literal["scored", "all"] = "scored"
    centre: bool = False
    unit: Unit = "token"
    dtype: torch.dtype = torch.float32
    groups: int = 1
    batch_size: int = 8
    budget_gb: float | None = None


def gradient_moments(
    model: LanguageModel,
    params: Params,
    objective: Objective,
    training: Training,
    examples: Examples,
    gathering: Gathering,
    seed: int,
    spaces: Mapping[Place, Subspace] | None = None,
    gains: Mapping[str, Float[Tensor, " d"]] | None = None,
) -> Iterator[Pass]:
    """Moments of activations and of upstream gradients, and G, under an objective, layers by layers.

    The loss is that of the objective's own trainer, whose head works in chunks, as the sum of the terms that
    it averages; δ_t is its gradient at a matrix's output at token t. It is taken on training examples that
    `seed` draws. The weights are frozen, so that nothing but the sums is held from one batch to the next, and
    the backward pass ends at the first layer that is wanted. With `spaces`, the moments at those places are
    summed over all groups, each of which has the part inside (`Moment.within`): inputs by the name and the
    layer of their site, upstream moments at ("prediction", None). `gains` of writes, by their names, are
    folded into theirs as `folded` does. The layers are split over as many passes as the budget asks for, with
    identical results; use each pass before asking for the next. Source: the mechanism offered by
    arXiv:2605.16600; these estimators are ours. Nothing is yielded for a mixture of experts: TRL adds its
    routers' balance to the loss, which is then no mean over terms; nor for an objective on completions that
    the policy samples. A training batch has the prompts of one optimizer step of `training`; a rest of
    prompts that fills none counts for the squared gradients only if it is all there is. Clipping is left out.

    Raises:
        ValueError: if the data lack fields that the objective needs, or a sum is not finite.
    """
    from datasets import Dataset

    architecture = model.architecture
    if architecture.stacks:
        log.warning("gradients under an objective are not taken of a mixture of experts")
        return
    if isinstance(objective, OnPolicy) and objective.on_policy:
        log.warning("gradients under an objective are not taken of completions that the policy samples")
        return
    network = model.with_weights(params).requires_grad_(False).eval()
    with TemporaryDirectory() as directory:
        arguments = training.arguments(Path(directory), seed, model.device.type)
        arguments["per_device_eval_batch_size"] = gathering.batch_size
        drawn = sampled(examples, gathering.prompts, training.max_length, seed)
        trainer = objective.trainer(network, model.tokenizer, drawn, arguments)
        slice_head(trainer, network)
        assert isinstance(trainer.train_dataset, Dataset)
        data = trainer.train_dataset.shuffle(seed=seed)
        data = data.select(range(min(gathering.prompts, len(data))))
        groups = max(1, min(gathering.groups, len(data)))
        step = training.batch_size * training.accumulate
        budget = float("inf") if gathering.budget_gb is None else gathering.budget_gb * GIB
        spaces = spaces or {}
        layer_size = _layer_size(architecture, params, gathering, groups, spaces)
        for layers in passes(range(architecture.n_layers), lambda layer: layer_size, budget):
            sums = _Sums(
                architecture, layers, gathering, groups, max(1, len(data) // step), spaces, gains or {}
            )
            seen = 0
            with sums.hooked(network), outdated_name_allowed():
                for inputs in trainer.get_eval_dataloader(data):  # pyright: ignore[reportArgumentType]
                    scored = objective.scored(inputs)
                    here = range(seen, seen + len(scored.terms))
                    of_prompts = [group_of(prompt, len(data), groups) for prompt in here]
                    sums.expect(
                        scored, scored.read(inputs)[1], of_prompts, [prompt // step for prompt in here]
                    )
                    loss = objective.total_loss(trainer, inputs)
                    if gathering.upstream or gathering.gradients:
                        loss.backward()
                    del loss  # its graph holds the hooks, and these the sums
                    seen = here.stop
            gathered = [sums.totals(len(data))]
            del sums  # which are large: only the caller keeps them
            yield gathered.pop()


def folded(moment: Moment, matrix: ResidualMatrix, params: Params) -> Moment:
    """C_delta at the residual stream: with the gain behind the matrix on both sides.

    It goes with `ResidualMatrix.written`, for an update diag(gain) dW with dW = Σ δ aᵀ.
    """
    gain = matrix.gain(params)
    if gain is None:
        return moment
    gain = gain.to(moment.sums)
    return replace(moment, sums=moment.sums * torch.outer(gain, gain), firsts=moment.firsts * gain)


class Diagonal:
    """Sums x and its squares entry by entry, as rows `x` come in; `add` mutates it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.firsts = self.squares = torch.zeros(0, dtype=dtype)
        self.count = 0

    def add(self, x: Float[Tensor, "row d"]) -> None:
        """Add the rows."""
        x = x.to(self.dtype)
        if not self.count:
            self.firsts, self.squares = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
        self.firsts = self.firsts + x.sum(0)
        self.squares = self.squares + x.square().sum(0)
        self.count += len(x)


class _GradientSums:
    """Σ δ aᵀ of one parameter by group, and the squared mean gradients of training batches."""

    def __init__(self, groups: int, like: Float[Tensor, "rows columns"]) -> None:
        self.sums = like.new_zeros(groups, *like.shape)
        self.squares, self.open = torch.zeros_like(like), torch.zeros_like(like)
        self.batch = 0  # which `open` is of

    def add(self, part: Float[Tensor, "rows columns"], group: int, batch: int, terms: Tensor) -> None:
        """Add Σ δ aᵀ over tokens of a group and a batch, batch by batch; mutates it.

        `terms` counts those of every batch.
        """
        if batch != self.batch:
            self.close(terms)
            self.batch = batch
        self.sums[group] += part
        self.open += part

    def close(self, terms: Float[Tensor, " batch"]) -> None:
        """Add the squares of the open batch's mean gradient, unless it is a rest; mutates it."""
        if self.batch < len(terms):
            self.squares += (self.open / terms[self.batch].clamp(min=1).to(self.open)).square_()
        self.open.zero_()


class _Sums:
    """The sums over some layers, to which hooks add."""

    def __init__(
        self,
        architecture: Architecture,
        layers: Sequence[int],
        gathering: Gathering,
        groups: int,
        batches: int,
        spaces: Mapping[Place, Subspace],
        gains: Mapping[str, Float[Tensor, " d"]],
    ) -> None:
        self.layers, self.gathering, self.groups = layers, gathering, groups
        self.spaces, self.gains = spaces, gains
        self.matrices = [matrix for matrix in architecture.matrices if matrix.layer in layers]
        self.sites = {site.module: site for site in architecture.sites if site.layer in layers}
        self.parallel = architecture.parallel
        self.samples = self.everywhere = self.cells = Samples(torch.zeros(0, 0, dtype=torch.bool), [], [])
        self.counts = torch.zeros(groups, dtype=torch.float64)
        self.terms = torch.zeros(groups, dtype=torch.float64)
        self.of_batches = torch.zeros(batches, dtype=torch.float64)  # terms of the whole training batches
        self.accumulators: dict[str, Accumulator] = {}
        self.diagonals: dict[str, Diagonal] = {}
        self.gradients: dict[str, _GradientSums] = {}

    def expect(
        self,
        scored: Scored,
        attention: Int[Tensor, "sequence position"],
        group: list[int],
        batch: list[int],
    ) -> None:
        """Note the positions of the next prompts, with the group and the training batch of each."""
        everywhere = attention.bool()
        where = everywhere
        if self.gathering.positions == "scored":
            where = torch.zeros_like(everywhere)
            where[:, :-1] = scored.targets[:, 1:]  # a token is predicted at the position before it
        self.samples = Samples(where, scored.prompt, group, self.gathering.unit)
        self.everywhere = Samples(everywhere, scored.prompt, group)
        pairs = zip(batch, group, strict=True)
        self.cells = Samples(
            everywhere, scored.prompt, [place * self.groups + other for place, other in pairs]
        )
        self.samples.add_counts(self.counts)
        for prompt, terms in enumerate(scored.terms):
            self.terms[group[prompt]] += terms
            if batch[prompt] < len(self.of_batches):
                self.of_batches[batch[prompt]] += terms

    @contextmanager
    def hooked(self, network: "PreTrainedModel") -> Iterator[None]:
        """Context in which the modules' inputs and upstream gradients are accumulated."""
        modules = {matrix.module: matrix for matrix in self.matrices}
        hooks = [
            network.get_submodule(name).register_forward_hook(self._hook(matrix))
            for name, matrix in modules.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(
        self, matrix: ResidualMatrix
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        site = self.sites.get(matrix.module) if self.gathering.inputs else None
        shared = self.parallel and matrix.kind == "o"  # its upstream gradient is that of down
        upstream = self.gathering.upstream and matrix.role == "write" and not shared
        both = self.gathering.inputs and self.gathering.upstream

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():  # not the policy's own pass
                return None
            if site is not None:
                space = self.spaces.get((site.name, site.layer))
                self._add(matrix.module + " input", inputs[0].detach(), space, mean=True)
            if both and matrix.role == "write":
                self._diagonal(matrix, "other").add(_rows(self.samples, inputs[0].detach(), mean=True))
            if not (upstream or self.gathering.gradients):
                return None
            a = inputs[0].detach() if self.gathering.gradients else None  # held until the backward pass

            def send_back(delta: Tensor) -> None:
                if upstream:
                    gain = self.gains.get(matrix.name)
                    delta_out = delta if gain is None else delta * gain.to(delta)
                    self._add(matrix.name, delta_out, self.spaces.get(PREDICTION))
                if both and matrix.role == "read":
                    self._diagonal(matrix, "other").add(_rows(self.samples, delta))
                if a is not None:
                    self._add_gradient(matrix, delta, a)

            # The weights are frozen: the graph starts at the first output whose gradient is wanted, of which
            # the network gets a copy, as some networks (Falcon) add to it in place.
            start = output if output.requires_grad else output.detach().requires_grad_()
            start.register_hook(send_back)
            return start if output.requires_grad else start.clone()

        return hook

    def _add(
        self, name: str, a: Float[Tensor, "*token d"], space: Subspace | None, mean: bool = False
    ) -> None:
        if name not in self.accumulators:
            self.accumulators[name] = Accumulator(self.groups, self.gathering.dtype, space)
        self.samples.add(self.accumulators[name], a, mean)

    def _diagonal(self, matrix: ResidualMatrix, of: str) -> Diagonal:
        return self.diagonals.setdefault(f"{matrix.module} {of}", Diagonal(self.gathering.dtype))

    def _add_gradient(
        self,
        matrix: ResidualMatrix,
        delta: Float[Tensor, "*token d_out"],
        a: Float[Tensor, "*token d_in"],
    ) -> None:
        delta, a = self.everywhere.by_sequence(delta), self.everywhere.by_sequence(a)
        rows, columns = (a, delta) if matrix.transposed else (delta, a)
        dtype = self.gathering.dtype
        if matrix.parameter not in self.gradients:
            like = torch.zeros(rows.shape[-1], columns.shape[-1], dtype=dtype, device=a.device)
            self.gradients[matrix.parameter] = _GradientSums(self.groups, like)
        sums = self.gradients[matrix.parameter]
        for start, end, cell in sorted(self.cells.runs(), key=lambda run: run[2]):
            batch, group = divmod(cell, self.groups)
            left, right = rows[start:end].flatten(0, 1), columns[start:end].flatten(0, 1)
            sums.add(left.T.to(dtype) @ right.to(dtype), group, batch, self.of_batches)
        for name, factor in (("rows", rows), ("columns", columns)):
            self._diagonal(matrix, name).add(factor[self.everywhere.where.to(factor.device)])

    def totals(self, prompts: int) -> Pass:
        """All that was accumulated."""
        moments = {
            name: accumulator.moment(self.counts, self.gathering.centre)
            for name, accumulator in self.accumulators.items()
        }
        for name, moment in moments.items():
            check_finite(moment.sums, f"the moment of {name}")
        for name, sums in self.gradients.items():
            sums.close(self.of_batches)
            check_finite(sums.sums, f"the gradient of {name}")
        writes = (
            [matrix for matrix in self.matrices if matrix.role == "write"] if self.gathering.upstream else []
        )
        source = {matrix.name: f"L{matrix.layer}.down" if self.parallel else matrix.name for matrix in writes}
        return Pass(
            self.layers,
            {site: moments[f"{name} input"] for name, site in self.sites.items() if self.gathering.inputs},
            {name: moments[taken] for name, taken in source.items()},
            {name: self._gradient(name, sums) for name, sums in self.gradients.items()},
            prompts,
            {
                matrix.name: self.diagonals[f"{matrix.module} other"]
                for matrix in self.matrices
                if f"{matrix.module} other" in self.diagonals
            },
        )

    def _gradient(self, parameter: str, sums: _GradientSums) -> MeanGradient:
        module = parameter.removesuffix(".weight")
        rows, columns = (self.diagonals[f"{module} {name}"] for name in ("rows", "columns"))
        return MeanGradient(
            sums.sums,
            self.terms,
            sums.squares / len(self.of_batches),
            rows.squares / rows.count,
            columns.squares / columns.count,
        )


def _rows(samples: Samples, a: Float[Tensor, "*token d"], mean: bool = False) -> Float[Tensor, "row d"]:
    """A module's inputs, or the gradients of its outputs, by sample; a prompt has its `mean` or its sum."""
    a, where = samples.by_sequence(a), samples.where.to(a.device)
    if samples.unit == "token":
        return a[where]
    prompts = torch.tensor(samples.prompt, device=a.device)
    whole = a.new_zeros(len(samples.group), a.shape[2]).index_add_(0, prompts, (a * where[..., None]).sum(1))
    if not mean:
        return whole
    counts = whole.new_zeros(len(whole)).index_add_(0, prompts, where.sum(1).to(whole))
    return whole / counts.clamp(min=1)[:, None]


def _layer_size(
    architecture: Architecture,
    params: Params,
    gathering: Gathering,
    groups: int,
    spaces: Mapping[Place, Subspace],
) -> float:
    """The bytes of the sums of one layer, the largest; two of those of gradients belong to no group."""
    sizes = []
    for layer in range(architecture.n_layers):
        here = [matrix for matrix in architecture.matrices if matrix.layer == layer]
        writes = 1 if architecture.parallel else sum(matrix.role == "write" for matrix in here)
        upstream = gathering.upstream * writes * (1 if PREDICTION in spaces else groups)
        sites = [site for site in architecture.sites if site.layer == layer]
        inputs = sum(1 if (site.name, site.layer) in spaces else groups for site in sites)
        squares = gathering.inputs * inputs + upstream
        entries = sum(prod(shape_of(params, name) or ()) for name in {matrix.parameter for matrix in here})
        gradients = gathering.gradients * entries * (groups + 2)
        sizes.append(squares * architecture.d_model**2 + gradients)
    return float(max(sizes) * gathering.dtype.itemsize)


def prompts_at_once(layers: int, d_model: int, length: int, most: int) -> int:
    """Prompts of a backward pass: as many as keep about 1 GiB for it, at least one and at most `most`.

    A prompt is two sequences of `length` tokens.
    """
    kept = 2.0 * length * layers * VALUES * d_model * torch.float32.itemsize
    return int(min(most, max(1.0, GIB / kept)))


def sampled(examples: Examples, prompts: int, length: int, seed: int) -> Examples:
    """Enough of the training examples for that many prompts, drawn by `seed`."""
    draw = random.Random(f"weightgeom {seed} prompts")
    text, characters = draw.sample(examples.text, len(examples.text)), 0
    for count, document in enumerate(text):
        if characters >= CHARACTERS * prompts * length:
            text = text[:count]
            break
        characters += len(document)
    # Some pairs are dropped for their length.
    pairs = draw.sample(examples.pairs, min(len(examples.pairs), 4 * prompts))
    return replace(examples, text=text, pairs=pairs)
