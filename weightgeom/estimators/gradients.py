"""Streaming moments under an objective: inputs, upstream gradients and the mean gradient, in one pass."""

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from weightgeom.geometry.bootstrap import bootstrap_times
from weightgeom.interfaces import Objective, Scored
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import Architecture, ResidualMatrix, Site
from weightgeom.params import Params
from weightgeom.text.examples import Examples
from weightgeom.training.config import Training
from weightgeom.training.fit import outdated_name_allowed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
CHARACTERS = 10  # of a text for each token that is wanted of it: more than the tokens of any tokenizer have


@dataclass(frozen=True, eq=False)
class MeanGradient:
    """G = E[δ aᵀ] of one parameter as it is stored: the gradient of the mean loss, by group of prompts.

    `sums` holds Σ δ aᵀ over the tokens of each group, `terms` how many terms the group's loss is a sum of.
    """

    sums: Float[Tensor, "group rows columns"]
    terms: Float[Tensor, " group"]

    @property
    def value(self) -> Float[Tensor, "rows columns"]:
        """The gradient of the mean loss."""
        return self.drawn(torch.ones_like(self.terms))

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
    """What one pass found in some of the layers.

    `inputs` has C_a = E[a aᵀ] by site; `upstream` C_delta = E[δ δᵀ] by the name of the o or down at whose
    output it is taken, one object for both in a parallel block; `gradients` G by parameter.
    """

    layers: Sequence[int]
    inputs: Mapping[Site, Moment]
    upstream: Mapping[str, Moment]
    gradients: Mapping[str, MeanGradient]
    prompts: int


@dataclass(frozen=True)
class Gathering:
    """What is accumulated, on how many prompts, and how.

    `positions` are those whose next token the objective scores, or all but padding, for C_a and
    C_delta; G is over all of them in any case, as it is the gradient of the weights. By `unit` a sample
    is a token, or a prompt with all its responses: the mean of what is read, the sum of what is sent
    back. `budget_gb` is in GiB, for the sums.
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
) -> Iterator[Pass]:
    """Moments of activations and of upstream gradients, and G, under an objective, layers by layers.

    The loss is that of the objective's own trainer, whose head works in chunks, as a sum over what it
    is a mean of; δ_t is its gradient at a matrix's output at token t. It is taken on training examples
    that `seed` draws. The weights are frozen, so that nothing but the sums is held from one batch to
    the next, and the backward pass ends at the first layer that is wanted. The layers are split over
    as many passes as the budget asks for, with identical results; take what is yielded before asking
    for more. Source: the mechanism offered by arXiv:2605.16600; these estimators are ours.
    Nothing is yielded for a mixture of experts: TRL adds its routers' balance to the loss, which is then no
    mean over terms.

    Raises:
        ValueError: if the data lack what the objective needs, or a sum is not finite.
    """
    from datasets import Dataset

    architecture = model.architecture
    if architecture.stacks:
        log.warning("gradients under an objective are not taken of a mixture of experts")
        return
    network = model.with_weights(params).requires_grad_(False).eval()
    with TemporaryDirectory() as directory:
        arguments = training.arguments(Path(directory), seed, model.device.type)
        arguments["per_device_eval_batch_size"] = gathering.batch_size
        some = sampled(examples, gathering.prompts, training.max_length, seed)
        trainer = objective.trainer(network, model.tokenizer, some, arguments)
        slice_head(trainer, network)
        assert isinstance(trainer.train_dataset, Dataset)
        data = trainer.train_dataset.shuffle(seed=seed)
        data = data.select(range(min(gathering.prompts, len(data))))
        groups = max(1, min(gathering.groups, len(data)))
        budget = float("inf") if gathering.budget_gb is None else gathering.budget_gb * GIB
        layer_size = _layer_size(architecture, params, gathering, groups)
        for layers in passes(range(architecture.n_layers), lambda layer: layer_size, budget):
            sums = _Sums(architecture, layers, gathering, groups)
            seen = 0
            with sums.hooked(network), outdated_name_allowed():
                for inputs in trainer.get_eval_dataloader(data):  # pyright: ignore[reportArgumentType]
                    scored = objective.scored(inputs)
                    here = range(seen, seen + len(scored.terms))
                    of_prompts = [group_of(prompt, len(data), groups) for prompt in here]
                    sums.expect(scored, scored.read(inputs)[1], of_prompts)
                    loss = objective.total_loss(trainer, inputs)
                    if gathering.upstream or gathering.gradients:
                        loss.backward()
                    seen = here.stop
            yield sums.found(len(data))
            del sums


def folded(moment: Moment, matrix: ResidualMatrix, params: Params) -> Moment:
    """C_delta of what reaches the residual stream: the gain of a norm behind the matrix on both sides.

    It goes with `ResidualMatrix.written`, for an update diag(gain) dW with dW = Σ δ aᵀ.
    """
    if matrix.norm is None:
        return moment
    gain = matrix.norm.gain(params).to(moment.sums)
    return replace(moment, sums=moment.sums * torch.outer(gain, gain), firsts=moment.firsts * gain)


class _Sums:
    """What is accumulated over some layers; its hooks add to it."""

    def __init__(
        self, architecture: Architecture, layers: Sequence[int], gathering: Gathering, groups: int
    ) -> None:
        self.layers, self.gathering, self.groups = layers, gathering, groups
        self.matrices = [matrix for matrix in architecture.matrices if matrix.layer in layers]
        self.sites = {site.module: site for site in architecture.sites if site.layer in layers}
        self.parallel = architecture.parallel
        self.samples = self.everywhere = Samples(torch.zeros(0, 0, dtype=torch.bool), [], [])
        self.counts = torch.zeros(groups, dtype=torch.float64)
        self.terms = torch.zeros(groups, dtype=torch.float64)
        self.accumulators: dict[str, Accumulator] = {}
        self.gradients: dict[str, Tensor] = {}

    def expect(self, scored: Scored, attention: Int[Tensor, "sequence position"], group: list[int]) -> None:
        """Take note of a batch that comes next: its positions, and the group of each of its prompts."""
        everywhere = attention.bool()
        where = everywhere
        if self.gathering.positions == "scored":
            where = torch.zeros_like(everywhere)
            where[:, :-1] = scored.targets[:, 1:]  # a token is predicted at the position before it
        self.samples = Samples(where, scored.prompt, group, self.gathering.unit)
        self.everywhere = Samples(everywhere, scored.prompt, group)
        self.samples.add_counts(self.counts)
        for prompt, terms in enumerate(scored.terms):
            self.terms[group[prompt]] += terms

    @contextmanager
    def hooked(self, network: "PreTrainedModel") -> Iterator[None]:
        """Within it, what the modules read and what comes back to them is accumulated."""
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

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():  # not the policy's own pass
                return None
            if site is not None:
                self._add(matrix.module + " input", inputs[0].detach(), mean=True)
            if not (upstream or self.gathering.gradients):
                return None
            a = inputs[0].detach() if self.gathering.gradients else None  # held until the backward pass

            def send_back(delta: Tensor) -> None:
                if upstream:
                    self._add(matrix.name, delta)
                if a is not None:
                    self._add_gradient(matrix, delta, a)

            # The weights are frozen: the graph starts at the first output whose gradient is wanted.
            output = output if output.requires_grad else output.detach().requires_grad_()
            output.register_hook(send_back)
            return output

        return hook

    def _add(self, name: str, a: Float[Tensor, "*token d"], mean: bool = False) -> None:
        if name not in self.accumulators:
            self.accumulators[name] = Accumulator(self.groups, self.gathering.dtype)
        self.samples.add(self.accumulators[name], a, mean)

    def _add_gradient(
        self,
        matrix: ResidualMatrix,
        delta: Float[Tensor, "*token d_out"],
        a: Float[Tensor, "*token d_in"],
    ) -> None:
        delta, a = self.everywhere.by_sequence(delta), self.everywhere.by_sequence(a)
        rows, columns = (a, delta) if matrix.transposed else (delta, a)
        if matrix.parameter not in self.gradients:
            self.gradients[matrix.parameter] = torch.zeros(
                *(self.groups, rows.shape[-1], columns.shape[-1]), dtype=self.gathering.dtype, device=a.device
            )
        for start, end, group in self.everywhere.runs():
            some, others = rows[start:end].flatten(0, 1), columns[start:end].flatten(0, 1)
            total = self.gradients[matrix.parameter][group]
            total.addmm_(some.T.to(total.dtype), others.to(total.dtype))

    def found(self, prompts: int) -> Pass:
        """All that was accumulated."""
        moments = {
            name: accumulator.moment(self.counts, self.gathering.centre)
            for name, accumulator in self.accumulators.items()
        }
        for name, moment in moments.items():
            check_finite(moment.sums, f"the moment of {name}")
        for name, sums in self.gradients.items():
            check_finite(sums, f"the gradient of {name}")
        writes = (
            [matrix for matrix in self.matrices if matrix.role == "write"] if self.gathering.upstream else []
        )
        source = {matrix.name: f"L{matrix.layer}.down" if self.parallel else matrix.name for matrix in writes}
        return Pass(
            self.layers,
            {site: moments[f"{name} input"] for name, site in self.sites.items() if self.gathering.inputs},
            {name: moments[taken] for name, taken in source.items()},
            {name: MeanGradient(sums, self.terms) for name, sums in self.gradients.items()},
            prompts,
        )


def _layer_size(architecture: Architecture, params: Params, gathering: Gathering, groups: int) -> float:
    """The bytes of the sums of one layer: those of the largest."""
    d = architecture.d_model
    squares = (2 if gathering.inputs else 0) + (
        (1 if architecture.parallel else 2) if gathering.upstream else 0
    )
    first = [matrix for matrix in architecture.matrices if matrix.layer == 0]
    entries = sum(params[name].numel() for name in {matrix.parameter for matrix in first})
    return float((squares * d * d + gathering.gradients * entries) * gathering.dtype.itemsize * groups)


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
