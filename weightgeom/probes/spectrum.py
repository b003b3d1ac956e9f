"""Spectra of activations, gradients, updates and weights: how few directions hold how much of each."""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from math import cos, pi, sin, sqrt
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.declarations import SPECTRA, ProbeDeclaration
from weightgeom.estimators.gradients import Gathering, gradient_moments
from weightgeom.estimators.moments import Moment
from weightgeom.estimators.pairs import MatrixPair, Visit, alone
from weightgeom.estimators.reference_subspaces import Inputs
from weightgeom.estimators.updates import update_of, zeros
from weightgeom.geometry.gram import product
from weightgeom.geometry.power_law import gaussian_spectra, power_law
from weightgeom.geometry.subspace import eigenvalues
from weightgeom.interfaces import Setting
from weightgeom.models.residual import Architecture, ResidualMatrix, Site, first_readers
from weightgeom.params import Params
from weightgeom.table import Row, row

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Thing = Literal["activation", "upstream", "gradient", "delta", "weight"]
NULL_DRAWS = 19  # Gaussian matrices of each shape
FIT_DRAWS = 99  # samples of a fitted power law
ROUNDING = 10  # times the precision and the largest eigenvalue: smaller eigenvalues of a Gram are rounding


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of second moments, and squared singular values of matrices, of every checkpoint.

    The things are `activation`, the inputs a with E[a aᵀ] on held-out text; `upstream`, the gradients δ
    at the outputs of o and down with E[δ δᵀ]; `gradient`, the mean gradient G = E[δ aᵀ]; `delta`, the
    update since the start; `weight`. The gradients are those of training examples, where the objective
    is known, as if it began at the checkpoint: a reference policy is the checkpoint itself. Matrices are
    taken as they reach the residual stream, gains of post-norms folded in; gradients are those at the
    matrix itself. λ are the eigenvalues of the moment, or of the matrix's Gram, no more than its smaller
    side or the number of tokens has; p = λ / Σλ. A thing that is zero has no rows.

    Quantities, each with the thing before it (`delta_spikes`), all of unit 1:
        eigenvalue: p of index `k`, from 1, for the `top` largest; in [0, 1].
        participation_ratio: 1 / Σp² = (Σλ)² / Σλ², in [1, d].
        effective_rank: exp(-Σ p ln p), in [1, d]. Roy & Vetterli (2007), EUSIPCO, for the moment or
            Gram: shares of energy also for matrices, for which theirs are of singular values.
        top_share: p of the largest, in [0, 1].
        stable_rank: Σλ / λ_1 = ‖W‖²_F / ‖W‖²_2, in [1, d].
        hill_exponent: the exponent α of the density λ^-α of the upper tail, Hill's tail index plus one, as in
            arXiv:2606.07082; n is the number of eigenvalues in the tail, chosen by the goodness of fit
            (`weightgeom.geometry.power_law`). Below 12 eigenvalues there is none.
        hill_distance: the Kolmogorov-Smirnov distance of the tail from the fit, in [0, 1].
        hill_p_value: the probability of such a distance, or a larger one, in samples of the fit, in (0, 1].
        null_..._mean, null_..._sd: of the participation ratio, of both ranks and of the exponent, under iid
            Gaussian entries, the Marchenko-Pastur law; of 19 samples.
        spikes: eigenvalues above the Marchenko-Pastur edge of `spikes`, a count.
        null_spikes_mean, null_spikes_sd: of matrices, under the same entries in random places, of `shuffles`
            samples. Source: ours.
        edge_informative: 1 if that mean is below 1, else 0: heavy-tailed entries exceed the edge by
            themselves, as it takes entries with a fourth moment. Bai & Yin (1988), Ann. Probab. 16:1729.

    In names of nulls, the thing stands behind `null_`. But for eigenvalues, the column `k` is d, the
    dimension of the space, and `subspace` is `residual`, or the name of the input: its rows are those of the
    matrix that reads there, q (or q_a), up, or the first of a mixer.
    """

    of: list[Thing] = Field(default=["activation", "upstream", "gradient", "delta", "weight"], min_length=1)
    top: int = Field(default=16, ge=1)  # eigenvalues that have rows
    tokens: int = Field(default=8192, ge=2)  # of held-out text, for activations
    length: int = Field(default=96, ge=2)  # tokens a sequence
    prompts: int = Field(default=256, ge=1)  # of the training examples, for gradients
    shuffles: int = Field(default=3, ge=0)  # of every matrix's entries, a decomposition each; 0: no null
    budget_gb: float | None = Field(default=None, gt=0)  # GiB for weights and sums; null: no limit

    @property
    def declaration(self) -> ProbeDeclaration:
        """The participation ratio of the update, where it is measured."""
        headline = "delta_participation_ratio" if "delta" in self.of else ""
        return ProbeDeclaration(
            headline, section=SPECTRA, by_layer=False, generic=False, needs_update=False, divisible=True
        )

    def check(self, architecture: Architecture) -> None:
        """Every model will do."""

    def figures(self, tables: "Mapping[str, pd.DataFrame]") -> "Mapping[str, Figure]":
        """Stable ranks by layer, over those of noise."""
        from weightgeom.figures.spectrum import stable_ranks, things

        table = tables.get("training")
        return {} if table is None or not things(table) else {"stable_rank_by_layer": stable_ranks(table)}

    def measurement(self, setting: Setting) -> Callable[[Params], list[Row]]:
        """The measurement of one checkpoint."""
        return alone(self, setting)

    def visits(self, setting: Setting) -> Callable[[Params], Visit]:
        """The same, for a walk with others."""
        architecture = setting.model.architecture
        readers = {
            (matrix.layer, matrix.site): matrix.kind for matrix in first_readers(architecture.matrices)
        }

        def visit(params: Params) -> Visit:
            of_pairs: list[Row] = []
            of_inputs: list[Row] = []

            def see(site: Site, moment: Moment) -> None:
                reader = readers[site.layer, site.name]
                matrix = "up" if reader == "router" else reader
                place = {"layer": site.layer, "matrix": matrix, "role": "read", "subspace": site.name}
                of_inputs.extend(
                    self._moment("activation", moment.value, moment.samples, place, setting.seed)
                )

            return Visit(
                lambda pair: of_pairs.extend(self._pair(pair, setting.seed)),
                lambda: [*of_inputs, *self._gradients(setting, params), *of_pairs],
                Inputs(self.tokens, self.length, budget_gb=self.budget_gb)
                if "activation" in self.of
                else None,
                see,
            )

        return visit

    def _pair(self, pair: MatrixPair, seed: int) -> Iterator[Row]:
        """The rows of an update and of the matrix after it."""
        matrix, of = pair.matrix, {}
        if "delta" in self.of:
            of["delta"] = pair.update_squares, pair.update.gram.dtype, pair.after - pair.before
        if "weight" in self.of:
            of["weight"] = pair.squares_after, pair.after.dtype, pair.after
        for thing, (squares, dtype, whole) in of.items():
            values = _above_rounding(squares[: min(whole.shape)], dtype)
            d = whole.shape[1 if matrix.role == "read" else 0]
            yield from self._rows(thing, values, d, whole.shape, whole.numel(), matrix.table_columns, seed)
        moved = {thing: whole for thing, (squares, _, whole) in of.items() if bool(squares.any())}
        if self.shuffles and moved:
            yield from self._shuffled(matrix, moved, seed)

    def _gradients(self, setting: Setting, params: Params) -> Iterator[Row]:
        upstream, gradients = "upstream" in self.of, "gradient" in self.of
        objective, training = setting.objective, setting.training
        if objective is None or training is None or not (upstream or gradients):
            return
        model = setting.model
        gathering = Gathering(
            self.prompts, inputs=False, upstream=upstream, gradients=gradients, budget_gb=self.budget_gb
        )
        for gathered in gradient_moments(
            model, params, objective, training, setting.examples, gathering, setting.seed
        ):
            means = {name: mean.value for name, mean in gathered.gradients.items()}
            for matrix in model.architecture.matrices:
                if (moment := gathered.upstream.get(matrix.name)) is not None:
                    columns = matrix.table_columns
                    yield from self._moment("upstream", moment.value, moment.samples, columns, setting.seed)
                if matrix.parameter in means:
                    yield from self._gradient(matrix, means, setting.seed, gathered.prompts)

    def _gradient(self, matrix: ResidualMatrix, means: Params, seed: int, n: int) -> Iterator[Row]:
        mean = update_of(matrix, means, zeros(matrix, means), written=False)
        values = _eigenvalues(mean.gram, min(mean.shape))
        yield from self._rows("gradient", values, len(mean.gram), mean.shape, n, matrix.table_columns, seed)
        if self.shuffles and bool(values.any()):
            yield from self._shuffled(matrix, {"gradient": matrix.of(means).cpu()}, seed)

    def _shuffled(
        self, matrix: ResidualMatrix, things: Mapping[str, Float[Tensor, "d_out d_in"]], seed: int
    ) -> Iterator[Row]:
        """The rows about the edge: spikes if the entries stood in random places, the same for all things."""
        generator = torch.Generator().manual_seed(seed)
        counts: dict[str, list[int]] = {thing: [] for thing in things}
        for _ in range(self.shuffles):
            order = None
            for thing, whole in things.items():
                wide = whole if whole.shape[0] <= whole.shape[1] else whole.T
                if order is None:
                    order = torch.randperm(wide.numel(), generator=generator)
                drawn = wide.flatten()[order].view_as(wide)
                gram = product(drawn, drawn) if drawn.dtype == torch.float32 else drawn @ drawn.T
                values = _eigenvalues(gram, len(drawn))
                counts[thing].append(spikes(values, (len(wide), wide.shape[1])))
        for thing, whole in things.items():
            spiked = torch.tensor(counts[thing], dtype=torch.float64)
            values = {f"null_{thing}_spikes_mean": float(spiked.mean())}
            if len(spiked) > 1:
                values[f"null_{thing}_spikes_sd"] = float(spiked.std())
            values[f"{thing}_edge_informative"] = float(spiked.mean() < 1)
            d = whole.shape[1 if matrix.role == "read" else 0]
            for name, value in values.items():
                place: dict[str, Any] = {"subspace": "residual", **matrix.table_columns, "k": d}
                yield row(name, value, n=self.shuffles, **place)

    def _moment(
        self, thing: Thing, moment: Float[Tensor, "d d"], tokens: int, place: dict[str, Any], seed: int
    ) -> Iterator[Row]:
        d = len(moment)
        values = _eigenvalues(moment, min(tokens, d))
        return self._rows(thing, values, d, (tokens, d), tokens, place, seed)

    def _rows(
        self,
        thing: Thing,
        values: Float[Tensor, " index"],
        d: int,
        shape: tuple[int, int],
        n: int,
        place: dict[str, Any],
        seed: int,
    ) -> Iterator[Row]:
        """The rows of eigenvalues that are, up to a factor, the squared singular values of a matrix.

        It is of `shape`, and d is the dimension of its side in the residual stream.
        """
        if not values.any():
            return
        shares = values / values.sum()
        whole: dict[str, Any] = {"subspace": "residual", **place, "k": d}
        for name, value in ranks(values).items():
            yield row(f"{thing}_{name}", value, n=n, **whole)
        yield row(f"{thing}_top_share", shares[0].item(), n=n, **whole)
        yield row(f"{thing}_spikes", float(spikes(values, shape)), n=n, **whole)
        generator = np.random.default_rng(seed)
        tail = power_law(values[values > 0], generator, FIT_DRAWS)
        if tail is not None and tail.p_value is not None:
            fit = {"exponent": tail.exponent, "distance": tail.distance, "p_value": tail.p_value}
            for name, value in fit.items():
                yield row(f"{thing}_hill_{name}", value, n=tail.tail, **whole)
        for name, drawn in gaussian_null(*sorted(shape), seed).items():
            if name != "hill_exponent" or tail is not None:
                yield row(f"null_{thing}_{name}_mean", float(drawn.mean()), n=len(drawn), **whole)
                yield row(f"null_{thing}_{name}_sd", float(drawn.std()), n=len(drawn), **whole)
        for index, share in enumerate(shares[: self.top].tolist(), 1):
            yield row(f"{thing}_eigenvalue", share, n=n, **{**whole, "k": index})


def ranks(squares: Float[Tensor, " index"]) -> dict[str, float]:
    """Participation ratio, effective and stable rank of squared singular values, in [1, their number]."""
    shares = squares.double() / squares.double().sum()
    return {
        "participation_ratio": 1 / shares.square().sum().item(),
        "effective_rank": torch.special.entr(shares).sum().exp().item(),
        "stable_rank": 1 / shares.max().item(),
    }


@lru_cache
def gaussian_null(small: int, large: int, seed: int) -> Mapping[str, Float[Tensor, " draw"]]:
    """Ranks and Hill's exponents of matrices of iid Gaussian entries, by name."""
    generator = np.random.default_rng(seed)
    nulls: dict[str, list[float]] = {}
    for values in gaussian_spectra(small, large, NULL_DRAWS, seed):
        values = values[values > 0]
        tail = power_law(values, generator)
        exponent = {} if tail is None else {"hill_exponent": tail.exponent}
        for name, value in {**ranks(values), **exponent}.items():
            nulls.setdefault(name, []).append(value)
    return {name: torch.tensor(drawn, dtype=torch.float64) for name, drawn in nulls.items()}


def spikes(squares: Float[Tensor, " index"], shape: tuple[int, int]) -> int:
    """The number of squared singular values, in descending order, above the edge of noise alone.

    Entries that are iid of variance σ² have singular values up to σ (√rows + √columns); σ is estimated
    from the median s of those given, zeros included, as s / √(n μ), n the larger side and μ the median
    of the Marchenko-Pastur law, so that a common factor does not matter. For the second moment over n
    tokens of dimension d it is the edge σ² (1 + √(d/n))² of its eigenvalues; as neighbouring tokens are
    alike, the n that counts is smaller and the edge is too low. The edge is that of large matrices: the
    largest singular value of pure Gaussian noise exceeds it, barely, with probability 0.17 (Tracy-Widom).
    Source: Gavish & Donoho (2014), IEEE Trans. Inf. Theory 60:5040 (the estimate of σ);
    Marchenko & Pastur (1967), Math. USSR Sb. 1:457 (the edge).
    """
    small, large = sorted(shape)
    median = squares.double().quantile(0.5).item()
    edge = median / (large * marchenko_pastur_median(small / large)) * (sqrt(small) + sqrt(large)) ** 2
    return int((squares > edge).sum())


@lru_cache
def marchenko_pastur_median(ratio: float) -> float:
    """Median of the Marchenko-Pastur law of unit variance, for a ratio of dimensions in (0, 1].

    The density √((b - x)(x - a)) / (2π ratio x), with a and b = (1 ∓ √ratio)², is integrated over the angle
    in x = 1 + ratio + 2 √ratio cos φ, in which it has no singularity at its ends.
    """
    from scipy.integrate import quad
    from scipy.optimize import brentq

    def x(angle: float) -> float:
        return 1 + ratio + 2 * sqrt(ratio) * cos(angle)

    def above(angle: float) -> float:
        return quad(lambda t: 2 * sin(t) ** 2 / (pi * x(t)), 0, angle)[0]

    return x(float(brentq(lambda angle: above(angle) - 0.5, 0, pi)))  # pyright: ignore[reportArgumentType]


def _eigenvalues(moment: Float[Tensor, "d d"], most: int) -> Float[Tensor, " index"]:
    """The `most` largest eigenvalues in descending order, in fp64; those that are rounding are 0."""
    return _above_rounding(eigenvalues(moment)[:most], moment.dtype)


def _above_rounding(values: Float[Tensor, " index"], dtype: torch.dtype) -> Float[Tensor, " index"]:
    """Descending eigenvalues, those that are rounding in this precision set to 0."""
    noise = ROUNDING * torch.finfo(dtype).eps * values[0]
    return torch.where(values > noise, values, 0.0)
