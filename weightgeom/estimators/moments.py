"""Streaming second moments of the activations that the residual-stream matrices read."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from weightgeom.estimators.walk import Walk, layer_of
from weightgeom.geometry.bootstrap import bootstrap_times
from weightgeom.geometry.gram import EXACT, Products, add_gram, mirror, product
from weightgeom.geometry.nulls import moment_eigen
from weightgeom.geometry.subspace import Subspace, eigenpairs, iterative_is_faster
from weightgeom.models.experts import routed_rows
from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import Site
from weightgeom.models.weights import walked
from weightgeom.params import Params
from weightgeom.text.tokens import Batch

Item = TypeVar("Item")
Unit = Literal["token", "prompt"]
GIB = 2**30
SUMS = 2.0**27  # bytes of sums that a pass accumulates, or a single one
UNPACKED = 2.0**27  # bytes of the sums of all groups at one place; above, they are packed
PACKED_ROWS = 512  # of a block
EXPLAINED = 2.0**25  # bytes of resampled directions that are multiplied at once
log = logging.getLogger(__name__)


def groups_size(d: int, groups: int, itemsize: int = 4) -> float:
    """Bytes of the sums of all groups at one place, which are packed where they exceed `UNPACKED`."""
    whole = 1.0 * d**2 * itemsize
    return 3 * whole + groups * (d**2 + d * PACKED_ROWS) if packs(d, groups, itemsize) else whole * groups


def packs(d: int, groups: int, itemsize: int = 4) -> bool:
    """Whether the sums of the groups at one place are packed."""
    return groups > 1 and itemsize == 4 and d**2 * itemsize * groups > UNPACKED


@dataclass(frozen=True, eq=False)
class Moment:
    """A second moment E[a aᵀ], kept as sums over groups of prompts, from which a bootstrap draws.

    `sums` holds Σ a aᵀ over the samples of each group, `firsts` Σ a, `counts` how many there are, and
    `samples` their sum: tokens, or prompts. `centred` subtracts the mean: the covariance. Where `within`
    holds what the groups have inside a subspace, there is one sum over all of them; where the groups are
    `packed`, one over each half of them.
    """

    sums: Float[Tensor, "sum d d"]
    firsts: Float[Tensor, "group d"]
    counts: Float[Tensor, " group"]
    centred: bool = False
    within: "Within | None" = None
    packed: "list[Packed] | None" = None

    @property
    def groups(self) -> int:
        """The number of groups of prompts."""
        return len(self.counts)

    @property
    def samples(self) -> int:
        """The number of tokens or prompts behind it."""
        return int(self.counts.sum())

    @property
    def value(self) -> Float[Tensor, "d d"]:
        """The moment, of all groups once."""
        if len(self.sums) == self.groups:
            return self.drawn(torch.ones_like(self.counts))
        value = self.sums.sum(0) / self.samples
        return value - torch.outer(self.mean, self.mean) if self.centred else value

    @property
    def per_dimension(self) -> float:
        """Samples for each dimension."""
        return self.samples / self.sums.shape[1]

    def halves(self) -> "tuple[Moment, Moment] | None":
        """The moments of the two halves of the groups, for estimates that must not share samples."""
        middle = len(self.sums) // 2
        if not middle:
            return None
        border = self.groups // 2
        first = Moment(self.sums[:middle], self.firsts[:border], self.counts[:border], self.centred)
        second = Moment(self.sums[middle:], self.firsts[border:], self.counts[border:], self.centred)
        return first, second

    @property
    def sums_of_groups(self) -> "Iterator[Float[Tensor, 'd d']]":
        """The sum of each group; those that are packed are unpacked one after the other."""
        return iter(self.sums) if self.packed is None else (part.unpacked() for part in self.packed)

    @property
    def drawable(self) -> int:
        """The number of groups whose sums there are, from which a bootstrap draws."""
        return len(self.sums) if self.packed is None else self.groups

    @property
    def traces(self) -> Float[Tensor, " group"]:
        """The trace of each group's sum, in fp64."""
        if self.packed is not None:
            return torch.stack([part.scale.square().sum() for part in self.packed])
        return self.sums.diagonal(dim1=1, dim2=2).double().sum(1)

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """E[a]."""
        return self.firsts.sum(0) / self.samples

    @cached_property
    def eigen(self) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
        """Its eigenvalues, ascending, and eigenvectors (`moment_eigen`), kept once they were asked for.

        Where groups are packed the vectors are in fp32.
        """
        values, vectors = moment_eigen(self.value.cpu())
        return values, vectors if self.packed is None else vectors.float()

    @property
    def root(self) -> Float[Tensor, "d d"]:
        """R with R Rᵀ = the moment, as `moment_root` has it, in fp64."""
        values, vectors = self.eigen
        return vectors * values.sqrt().to(vectors)

    def top(self, k: int) -> Subspace:
        """Its top-k principal directions, of one decomposition with `root` where that is no detour."""
        if iterative_is_faster(self.sums.shape[1], k):
            return Subspace.top(self.value.cpu(), k)
        _, vectors = self.eigen
        return Subspace(vectors[:, -k:].flip(1).double())

    def drawn(self, times: Float[Tensor, " group"]) -> Float[Tensor, "d d"]:
        """The moment of a sample in which each group occurs this many times."""
        times = times.to(self.sums)
        total = times @ self.counts.to(times)
        if self.packed is None:
            value = torch.einsum("g,gij->ij", times, self.sums) / total
        else:
            value = torch.zeros_like(self.sums[0])
            for time, part in zip(times.tolist(), self.sums_of_groups, strict=True):
                value.add_(part, alpha=time / float(total))
        if not self.centred:
            return value
        mean = times @ self.firsts / total
        return value - torch.outer(mean, mean)

    def resampled(self, resamples: int, seed: int) -> Iterator[Float[Tensor, "d d"]]:
        """The moment of bootstrap samples of the groups, none where there is a single group."""
        for times in bootstrap_times(self.drawable, resamples, seed):
            yield self.drawn(times)

    def resampled_levels(self, space: Subspace, resamples: int, seed: int) -> Float[Tensor, "resample k"]:
        """Shares of the samples of `resampled` inside the first 1, 2, ... k directions of a subspace.

        For moments that are not centred; where there is `within`, of its own subspace.
        """
        within = self._inside(space) if self.within is None else self.within
        return within.resampled(resamples, seed)[:, : space.basis.shape[1]]

    def settled(self, space: Subspace | None = None) -> "Settled":
        """The moment without its groups' matrices: its root, and the groups' sums inside `space`."""
        root = self.root
        small = root if len(root) <= EXACT else root.float()
        within = self.within if space is None else self._inside(space)
        return Settled(small, self.samples, self.groups, self.centred, within)

    def _inside(self, space: Subspace) -> "Within":
        basis = space.basis.to(self.sums)
        across = basis.T.contiguous()
        inside = torch.stack([(basis * product(total, across)).sum(0) for total in self.sums_of_groups])
        return Within(inside.double().cpu(), self.traces.cpu())

    def resampled_tops(self, k: int, resamples: int, seed: int, drop: bool = False) -> "Resampled | None":
        """Top-k directions of the samples of `resampled`, each with its shares of the sample's trace.

        In the eigenbasis of the whole, with eigenvalues λ, a sample C has its top directions w and their
        eigenvalues μ among the top 3k of the whole. Beyond these the directions have y = C w / (μ - λ) to
        first order, and μ grows by yᵀ C w (Löwdin's partitioning). So every group is turned into these
        coordinates once, and a sample costs (3k)³ and d² k of work instead of d³. Exact up to d = 256, and
        where 4k reaches d; the choice of 3k is ours. None where there is a single group. With `drop`
        packed groups, which take much memory, are dropped from this moment one by one as they are turned.
        """
        d = self.sums.shape[1]
        m = 3 * k if d > EXACT and 4 * k < d else d
        values, vectors = (part.flip(-1) for part in self.eigen)
        turn = vectors.T.to(self.sums).contiguous()
        del vectors
        traces, drawn = self.traces, bootstrap_times(self.drawable, resamples, seed)
        scale, turned = None, []
        if self.packed is None:
            turned = torch.stack([product(turn, product(turn[:m], total)) for total in self.sums])
        else:
            scale = (self.samples * values).clamp(min=1e-12 * self.samples * float(values[0])).sqrt()
            packed = self.packed if drop else [*self.packed]
            if drop:
                self.sums.data = self.sums.new_empty(0)
            while packed:
                part = product(turn[:m], packed.pop(0).unpacked())
                turned.append(_packed(product(turn, part), scale, scale[:m]))
        # Half precision moves a share by 1e-5 of itself: what is kept of all layers is mostly this.
        tops = torch.empty(len(drawn), k, d, dtype=self.sums.dtype if d <= EXACT else torch.float16)
        shares = []
        for index, times in enumerate(drawn):
            total = float(times.double() @ self.counts.double())
            if scale is None:
                assert isinstance(turned, Tensor)
                sample = torch.einsum("g,gij->ij", times.to(turned), turned) / total
            else:
                sample = torch.zeros_like(turned[0], dtype=turn.dtype)
                for time, part in zip(times.tolist(), turned, strict=True):
                    sample.add_(part, alpha=time / total)
                for rows in range(0, d, PACKED_ROWS):  # in fp64, which all at once is much
                    block = slice(rows, rows + PACKED_ROWS)
                    sample[block] *= torch.outer(scale[block], scale[:m]).to(sample)
            trace = float(times.to(traces) @ traces) / total
            if self.centred:
                mean = times.to(self.firsts) @ self.firsts / total
                there = turn @ mean
                sample -= torch.outer(there, there[:m])
                trace -= float(mean.square().sum())
            top, eigenvalues = _top_of(sample, values.to(sample), k)
            tops[index] = product(top.T.contiguous(), turn.T)
            shares.append(eigenvalues.cpu() / trace)
        return Resampled(tops, torch.stack(shares)) if shares else None


def _top_of(
    sample: Float[Tensor, "d m"], values: Float[Tensor, " d"], k: int
) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
    """Top-k directions and eigenvalues of a matrix by m of its columns and its diagonal `values` beyond."""
    m = sample.shape[1]
    whole = m == len(sample)
    mu, w = eigenpairs(sample, k) if whole else torch.linalg.eigh(sample[:m])
    mu, w = mu[-k:].flip(0).double(), w[:, -k:].flip(1)
    if whole:
        return w.to(sample), mu
    image = sample[m:] @ w
    gaps = (mu.to(sample) - values[m:, None]).clamp(min=1e-6 * float(mu[0]))
    y = image / gaps
    # Orthonormal again, and the first directions remain those of the largest eigenvalues.
    factor = torch.linalg.cholesky(torch.eye(k, dtype=mu.dtype, device=mu.device) + (y.T @ y).double())
    inverse = torch.linalg.inv(factor).to(sample)
    return torch.cat([w, y]) @ inverse.T, mu + (y * image).sum(0).double()


@dataclass(frozen=True, eq=False)
class Packed:
    """The sum Σ a aᵀ of a group in half precision: its upper triangle in blocks of rows, and a scale.

    Entries are over √(C_ii C_jj), so that none exceeds 1 and each is rounded by at most 2⁻¹¹ of itself. They
    serve the bootstrap alone, whose Monte Carlo error is far larger. `scale` is √C_ii, in fp64.
    """

    scale: Float[Tensor, " d"]
    blocks: tuple[Float[Tensor, "rows columns"], ...]

    @classmethod
    def of(cls, total: Float[Tensor, "d d"]) -> "Packed":
        """Of a sum whose upper triangle alone is read."""
        scale = total.diagonal().double().sqrt()
        rows = range(0, len(total), PACKED_ROWS)
        blocks = (
            _packed(total[row : row + PACKED_ROWS, row:], scale[row : row + PACKED_ROWS], scale[row:])
            for row in rows
        )
        return cls(scale, tuple(blocks))

    def unpacked(self) -> Float[Tensor, "d d"]:
        """The whole sum, in fp32."""
        scale, row = self.scale.float(), 0
        total = torch.empty(len(scale), len(scale), device=scale.device)
        for block in self.blocks:
            end = row + len(block)
            total[row:end, row:] = block.float() * scale[row:end, None] * scale[row:]
            row = end
        mirror(total)
        return total


def _packed(
    part: Float[Tensor, "n m"], rows: Float[Tensor, " n"], columns: Float[Tensor, " m"]
) -> Float[Tensor, "n m"]:
    """Entries over the scales of their row and column, in fp16; 0 where a scale is."""
    rows, columns = (scale.to(part).clamp(min=torch.finfo(torch.float32).tiny) for scale in (rows, columns))
    return (part / rows[:, None] / columns).half()


@dataclass(frozen=True, eq=False)
class Within:
    """Sums of squares of groups of samples, along the directions of a subspace and in all."""

    inside: Float[Tensor, "group k"]
    traces: Float[Tensor, " group"]

    def resampled(self, resamples: int, seed: int) -> Float[Tensor, "resample k"]:
        """Share of bootstrap samples of the groups inside the first 1, 2, ... k directions."""
        times = bootstrap_times(len(self.traces), resamples, seed).to(self.traces)
        return (times @ self.inside.cumsum(1)) / (times @ self.traces)[:, None]


@dataclass(frozen=True, eq=False)
class Settled:
    """A second moment by its root alone (fp32 above d = 256), with the number of its samples and groups."""

    root: Float[Tensor, "d d"]
    samples: int
    groups: int
    centred: bool
    within: Within | None = None

    @property
    def value(self) -> Float[Tensor, "d d"]:
        """The moment."""
        return self.root @ self.root.T

    @property
    def per_dimension(self) -> float:
        """Samples for each dimension."""
        return self.samples / len(self.root)

    def resampled_levels(self, space: Subspace, resamples: int, seed: int) -> Float[Tensor, "resample k"]:
        """As `Moment.resampled_levels`, of the subspace of `within`."""
        if self.groups < 2:
            return self.root.new_zeros(0, space.basis.shape[1])
        assert self.within is not None, "the groups are gone"
        return self.within.resampled(resamples, seed)[:, : space.basis.shape[1]]


@dataclass(frozen=True, eq=False)
class Resampled:
    """The top directions of bootstrap samples of a moment, with their shares of each sample's trace.

    Directions are in rows.
    """

    tops: Float[Tensor, "resample k d"]
    shares: Float[Tensor, "resample k"]

    def __len__(self) -> int:
        return len(self.tops)

    def __iter__(self) -> Iterator[tuple[Subspace, Float[Tensor, " k"]]]:
        for top, shares in zip(self.tops, self.shares, strict=True):
            yield Subspace(top.T.double()), shares

    def explained(self, gram: Float[Tensor, "d d"]) -> Float[Tensor, "resample k"]:
        """Share of the trace of a Gram matrix inside the first 1, 2, ... k directions of each sample."""
        gram = gram.to(torch.float32)
        size = self.tops[0].numel() * gram.itemsize
        inside = []
        for tops in self.tops.split(max(1, int(EXPLAINED // size))):
            rows = tops.flatten(0, 1).float()
            inside.append((product(rows, gram) * rows).sum(1))
        inside = torch.cat(inside).view(self.shares.shape)
        return inside.double().cumsum(1) / float(gram.diagonal().double().sum())


class Accumulator:
    """Sums a aᵀ and a over groups of prompts, as rows `a` come in; `add` mutates it.

    With a subspace, a aᵀ is summed over all groups, and by group what lies inside the subspace. With `packs`
    the groups, which must come in their order, are packed one by one, and summed over each half of them.
    """

    def __init__(
        self, groups: int, dtype: torch.dtype, space: Subspace | None = None, packs: bool = False
    ) -> None:
        self.groups = groups
        self.dtype = dtype
        self.space = space
        self.packs = packs
        self.packed: list[Packed] = []
        self.sums: Tensor | None = None
        self.firsts: Tensor | None = None
        self.within: Within | None = None

    def add(self, a: Float[Tensor, "row d"], group: int) -> None:
        """Add the rows to a group."""
        a = a.to(self.dtype)
        d = a.shape[1]
        if self.sums is None or self.firsts is None:
            sums = 3 if self.packs else self.groups if self.space is None else 1
            self.sums = torch.zeros(sums, d, d, dtype=self.dtype, device=a.device)
            self.firsts = torch.zeros(self.groups, d, dtype=self.dtype, device=a.device)
            if self.space is not None:
                inside = torch.zeros(
                    self.groups, self.space.basis.shape[1], dtype=torch.float64, device=a.device
                )
                self.within = Within(inside, torch.zeros_like(inside[:, 0]))
        if self.packs:
            self._pack_up_to(group)
        add_gram(self.sums[-1 if self.packs else 0 if self.space is not None else group], a.T)
        self.firsts[group] += a.sum(0)
        if self.space is not None and self.within is not None:
            along = product(a, self.space.basis.T.to(a).contiguous())
            self.within.inside[group] += along.square().sum(0)
            self.within.traces[group] += a.square().sum()

    def moment(self, counts: Float[Tensor, " group"], centred: bool) -> Moment:
        """The moment of all that was added; the sums are handed over."""
        assert self.sums is not None and self.firsts is not None, "nothing was added"
        if self.packs:
            self._pack_up_to(self.groups)
            self.sums = self.sums[:2].clone()  # without the room of the last group
        for total in self.sums:
            mirror(total)
        packed = self.packed if self.packs else None
        return Moment(self.sums, self.firsts, counts, centred, self.within, packed)

    def _pack_up_to(self, group: int) -> None:
        """Close the groups in front of this one: the last of `sums` is that of the open group."""
        assert self.sums is not None and group >= len(self.packed), "groups come in their order"
        while len(self.packed) < group:
            half = int(len(self.packed) >= self.groups // 2)
            self.packed.append(Packed.of(self.sums[-1]))
            self.sums[half] += self.sums[-1]
            self.sums[-1].zero_()


class Routed:
    """The inputs of a layer's experts, row by row, with the experts that read each; `add` mutates it.

    They are kept because sums for each of many experts would be larger: with 16 groups, 16 d² for an expert,
    and d times the number of tokens for all experts of a layer together.
    """

    def __init__(self, experts: int, groups: int, dtype: torch.dtype) -> None:
        self.experts, self.groups, self.dtype = experts, groups, dtype
        self.parts: list[tuple[Float[Tensor, "row d"], Int[Tensor, "row choice"], Int[Tensor, " row"]]] = []

    def add(self, inputs: Sequence[Tensor], samples: "Samples") -> None:
        """Keep the rows of a batch that count, by the inputs of the module that the experts are in."""
        rows, token, chosen = routed_rows(inputs, self.experts)
        count = samples.where.flatten()[token]
        of_sequences = torch.tensor([samples.group[prompt] for prompt in samples.prompt], device=token.device)
        group = of_sequences[token // samples.where.shape[1]]
        self.parts.append((rows[count], chosen[count], group[count]))

    def moment(self, expert: int, centred: bool) -> Moment | None:
        """The moment of the tokens that an expert gets, over the groups that have some; None without any."""
        accumulator = Accumulator(self.groups, self.dtype)
        counts = torch.zeros(self.groups, dtype=torch.float64)
        for rows, chosen, group in self.parts:
            mine = (chosen == expert).any(1)
            groups, sizes = group[mine].unique_consecutive(return_counts=True)
            parts = rows[mine].split(sizes.tolist())
            for place, part in zip(groups.tolist(), parts, strict=True):
                accumulator.add(part, place)
                counts[place] += len(part)
        reached = counts > 0
        if not bool(reached.any()):
            return None
        whole = accumulator.moment(counts, centred)
        return Moment(whole.sums[reached], whole.firsts[reached], counts[reached], centred)


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of a batch: which positions count, and the prompt and the group that each belongs to.

    With the unit `prompt` a sample is what happens at all positions of a prompt together, in whichever
    of its sequences: the sum, or the mean.
    """

    where: Bool[Tensor, "sequence position"]
    prompt: Sequence[int]  # of every sequence
    group: Sequence[int]  # of every prompt
    unit: Unit = "token"

    def add(self, accumulator: Accumulator, a: Float[Tensor, "*token d"], mean: bool = False) -> None:
        """Add a module's inputs, or its upstream gradients; `mean` over a prompt instead of their sum."""
        a = self.by_sequence(a)
        if self.unit == "prompt":
            prompts = torch.tensor(self.prompt, device=a.device)
            sums = (a * self.where[..., None]).sum(1).to(accumulator.dtype)
            whole = sums.new_zeros(len(self.group), a.shape[2]).index_add_(0, prompts, sums)
            if mean:
                counts = self.where.sum(1).to(whole)
                whole /= whole.new_zeros(len(self.group)).index_add_(0, prompts, counts).clamp(min=1)[:, None]
            for start, end in _runs(self.group):
                accumulator.add(whole[start:end], self.group[start])
            return
        for start, end, group in self.runs():
            part, where = a[start:end], self.where[start:end]
            accumulator.add(part.flatten(0, 1) if bool(where.all()) else part[where], group)

    def by_sequence(self, a: Float[Tensor, "*token d"]) -> Float[Tensor, "sequence position d"]:
        """The rows of a batch by sequence; some modules are given them flattened, such as OPT's MLP."""
        return a.reshape(*self.where.shape, a.shape[-1])

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Neighbouring sequences of one group: the first, the one behind the last, and the group."""
        groups = [self.group[prompt] for prompt in self.prompt]
        for start, end in _runs(groups):
            yield start, end, groups[start]

    def add_counts(self, counts: Float[Tensor, " group"]) -> None:
        """Add the number of samples of each group."""
        if self.unit == "prompt":
            for group in self.group:
                counts[group] += 1
        else:
            tokens = self.where.sum(1).cpu()
            for start, end, group in self.runs():
                counts[group] += tokens[start:end].sum()


def _runs(groups: Sequence[int]) -> Iterator[tuple[int, int]]:
    edges = [0, *(i for i in range(1, len(groups)) if groups[i] != groups[i - 1]), len(groups)]
    return pairwise(edges)


class Enough(Exception):
    """Ends a forward pass at the last input that is needed."""


def activation_moments(
    model: LanguageModel,
    params: Params,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    *,
    centre: bool = False,
    unit: Unit = "token",
    dtype: torch.dtype = torch.float32,
    groups: int = 1,
    budget_gb: float | None = None,
) -> Iterator[tuple[Site, Moment]]:
    """Second moments E[a aᵀ] of the inputs at every site, over all tokens but padding, site by site.

    The d x d sums, one for each of `groups` groups of sequences, are those of some layers at a time, up to
    SUMS bytes: the next layers go on from the hidden states that are kept of all tokens (`Walk`), with
    identical results. A pass ends at its last site, so that no logits are computed. With `budget_gb` (GiB),
    weights in fp32 that exceed half of the budget are read module by module, and where a quarter is too
    little for the hidden states, passes start at the embedding. Use each moment before asking for the next.
    `centre` subtracts the mean: the covariance. A sample is a token or, by `unit`, the mean over a sequence.
    Source: the attention-input subspace of arXiv:2605.16600; uncentred by default (ours).

    At the site of an expert it is over the tokens that the router sends to it, and a sample is a token.
    Experts without any are left out. All experts of a layer are among the `sites`, or none: their inputs are
    kept in memory, those of one layer at least, and the sums are made one expert after the other.

    Raises:
        ValueError: if an activation is not finite.
    """
    budget = float("inf") if budget_gb is None else budget_gb * GIB
    fetches = walked(params)
    if fetches or model.size > budget / 2:
        model, weights = model.streaming(params), {}
    else:
        weights = model.hold(params)
    sequences = sum(len(batch.input_ids) for batch in batches)
    groups = max(1, min(groups, sequences))
    d, tokens = model.architecture.d_model, sum(int(batch.attention_mask.sum()) for batch in batches)
    places: dict[Site, list[Site]] = {}  # by the site of its module, that itself or those of its experts
    for site in sites:
        places.setdefault(replace(site, expert=None), []).append(site)

    packed = packs(d, groups, dtype.itemsize)

    def size(place: Site) -> float:
        kept = places[place][0].expert is not None
        return 4.0 * d * tokens if kept else groups_size(d, groups, dtype.itemsize)

    states = 4 * d * sum(batch.input_ids.numel() for batch in batches)  # bytes
    walk = Walk.through(model.network, list(places)) if fetches or states <= budget / 4 else None
    if walk is not None and states > budget / 4:
        log.warning(
            "budget_gb=%g: the hidden states of the held-out text take %.3g GiB, more than a quarter, and are"
            " kept all the same, as weights at a URL would otherwise be fetched once for each layer; give"
            " fewer tokens or ++model.cache=true",
            *(budget_gb, states / GIB),
        )
    limit = budget / 2 if walk is None else min(budget / 4, SUMS)
    together = list(passes(list(places), size, limit))
    for part, next_parts in zip(together, [*together[1:], []], strict=True):
        sums = {place: Accumulator(groups, dtype, packs=packed) for place in part if place in places[place]}
        kept = {place: Routed(len(places[place]), groups, dtype) for place in part if place not in sums}
        following = next_parts[0] if next_parts else None
        counts = _one_pass(model, weights, batches, sums, kept, sequences, groups, unit, walk, following)
        for place in part:
            for site in places[place]:
                if site.expert is None:
                    moment = sums.pop(place).moment(counts, centre)
                else:
                    moment = kept[place].moment(site.expert, centre)
                if moment is not None:
                    check_finite(moment.sums, f"the {site.name} of layer {site.layer}")
                    handed_over = [(site, moment)]
                    del moment  # which is large: only the caller keeps it
                    yield handed_over.pop()
            kept.pop(place, None)


def _one_pass(
    model: LanguageModel,
    weights: Params,
    batches: Iterable[Batch],
    sums: Mapping[Site, Accumulator],
    kept: Mapping[Site, Routed],
    sequences: int,
    groups: int,
    unit: Unit,
    walk: Walk | None,
    following: Site | None,
) -> Float[Tensor, " group"]:
    """Fills the sums, and the inputs of experts that are kept, in a pass; the samples of each group."""
    sites = [*sums, *kept]
    ends = None if walk is None else following
    waiting: set[Site] = set()
    samples = Samples(torch.zeros(0, 0, dtype=torch.bool), [], [])

    def arrived(site: Site) -> None:
        waiting.discard(site)
        if not waiting:
            raise Enough

    def hooked(site: Site) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | None = None) -> None:
            if site in kept:
                kept[site].add(inputs, samples)
            else:
                samples.add(sums[site], inputs[0] if output is None else output, mean=True)
            arrived(site)

        module = model.network.get_submodule(site.module)
        if site.name == "final_input":
            return module.register_forward_hook(hook)
        return module.register_forward_pre_hook(hook)

    counts, seen = torch.zeros(groups, dtype=torch.float64), 0
    with ExitStack() as stack:
        if walk is not None:
            stack.enter_context(walk.part(min(sites, key=layer_of), ends, arrived))
        for site in sites:
            stack.callback(hooked(site).remove)
        for batch in (batch.to(model.device) for batch in batches):
            here = range(seen, seen + len(batch.input_ids))
            of_prompts = [group_of(prompt, sequences, groups) for prompt in here]
            samples = Samples(batch.attention_mask.bool(), range(len(here)), of_prompts, unit)
            samples.add_counts(counts)
            seen = here.stop
            waiting.update(sites if ends is None else [*sites, ends])
            with suppress(Enough), Products():
                model.logits(weights, batch, keep=1)
    return counts


def passes(items: Sequence[Item], size: Callable[[Item], float], budget: float) -> Iterator[list[Item]]:
    """Neighbouring items whose sizes (bytes) together stay within the budget; each pass has one at least."""
    part: list[Item] = []
    held = 0.0
    for item in items:
        if part and held + size(item) > budget:
            yield part
            part, held = [], 0.0
        part.append(item)
        held += size(item)
    if part:
        yield part


def group_of(prompt: int, prompts: int, groups: int) -> int:
    """The group of the prompt with this number; neighbours share one, so that a batch has few groups."""
    return prompt * groups // prompts


def check_finite(sums: Tensor, what: str) -> None:
    """Raise ValueError if an entry is not finite."""
    if not bool(sums.isfinite().all()):
        raise ValueError(f"{what} is not finite: the weights have diverged")
