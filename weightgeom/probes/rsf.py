"""Relative subspace fraction: how much of an update lies in what the model reads and predicts."""

from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.interfaces import Params, Row, Setting
from weightgeom.moments import activation_moments
from weightgeom.residual import Architecture, ResidualMatrix
from weightgeom.stats import Null, isotropic_null, rotation_null
from weightgeom.subspace import Subspace, prediction_moment
from weightgeom.table import row
from weightgeom.tokens import packed

Place = tuple[str, int | None]  # the subspace's name and layer


@dataclass(frozen=True)
class RSF:
    """Share of every update dW inside a subspace, over its level k/d under chance.

    Read matrices (q k v gate up) are compared on their input side with the top-k principal
    directions of their inputs, write matrices (o down) on their output side with the top-k right
    singular vectors of the unembedding, all with a random subspace beside. Source: arXiv:2605.16600,
    one side at a time; its sum of two sides does not arise, as no matrix of these reads and writes.

    Quantities:
        fraction: ‖dW U‖²_F / ‖dW‖²_F (read) or ‖Uᵀ dW‖²_F / ‖dW‖²_F (write), in [0, 1].
        ratio: fraction / (k/d), in [0, d/k]; 1 is isotropic.
        null_ratio_mean, null_ratio_sd: of the ratio under `null_kind`.
        z, p_value: of the fraction under `null_kind`, one-sided: is dW more concentrated than chance?
        matched_ratio: the ratio expected on the read side if what dW writes did not depend on what it reads;
            left out where the inputs are centred, as the identity needs E[a aᵀ].
        delta_norm: ‖dW‖_F, in the units of the weights. moved_share: share of entries that changed.

    `k` defaults to d/8 (ours). `at` is whose subspaces are taken: the trajectory's `start`, the
    measured `step` itself or the `end`; `auto` is the start, or the step where the start is random.
    """

    headline: ClassVar[str] = "ratio"

    k: int | list[int] | None = None
    at: Literal["auto", "start", "step", "end"] = "auto"
    null_kind: Literal["rotation", "isotropic"] = "rotation"
    tokens: int = Field(default=8192, ge=2)  # of held-out text, for the inputs' second moments
    length: int = Field(default=96, ge=2)  # tokens a sequence
    centre_inputs: bool = False
    centre_unembedding: bool = True
    fold_gain: bool = True  # the final norm's gain, into the unembedding
    fold_post_norm: bool = True  # the gain of a norm behind o and down (OLMo-2, Gemma-2), into them

    def dimensions(self, d: int) -> list[int]:
        """The subspace dimensions asked for, in ascending order."""
        return sorted(
            {max(1, d // 8)} if self.k is None else {self.k} if isinstance(self.k, int) else set(self.k)
        )

    def check(self, architecture: Architecture) -> None:
        """Refuse a k that does not fit."""
        d = architecture.d_model
        wanted = self.dimensions(d)
        if not wanted or wanted[0] < 1 or wanted[-1] > d:
            raise ValueError(f"probe.rsf.k must be 1 to {d}, the width of the residual stream, got {self.k}")

    def measurement(self, setting: Setting) -> Callable[[Params], list[Row]]:
        """The measurement of one checkpoint's update since the trajectory's start."""
        at = ("step" if setting.from_random else "start") if self.at == "auto" else self.at
        frame = (
            None if at == "step" else self._frame(setting, setting.start if at == "start" else setting.end)
        )

        def measure(params: Params) -> list[Row]:
            spaces, moments, tokens = frame or self._frame(setting, params)
            rows: list[Row] = []
            for matrix in setting.model.architecture.matrices:
                rows += self._matrix(
                    matrix, self._of(matrix, params), self._of(matrix, setting.start), spaces, moments, tokens
                )
            return rows

        return measure

    def _of(self, matrix: ResidualMatrix, params: Params) -> Float[Tensor, "d_out d_in"]:
        return (matrix.written if self.fold_post_norm else matrix.of)(params).float()

    def _frame(
        self, setting: Setting, params: Params
    ) -> tuple[dict[Place, Subspace], dict[Place, Tensor], int]:
        """The subspaces at one model, the second moments behind them and the tokens behind those."""
        model, architecture = setting.model, setting.model.architecture
        weights = model.hold(params)
        batches = packed(setting.examples.heldout, model.tokenizer, self.length, self.tokens)
        found, tokens = activation_moments(
            model, weights, batches, architecture.sites, centre=self.centre_inputs
        )
        moments: dict[Place, Tensor] = {(site.name, site.layer): moment for site, moment in found.items()}
        gain = architecture.final_norm.gain(weights)
        moments["prediction", None] = prediction_moment(
            architecture.unembedding(weights), gain, fold_gain=self.fold_gain, centre=self.centre_unembedding
        )
        largest = self.dimensions(architecture.d_model)[-1]
        spaces = {place: Subspace.top(moment.cpu(), largest) for place, moment in moments.items()}
        generator = torch.Generator().manual_seed(setting.seed)
        spaces["random", None] = Subspace.random(architecture.d_model, largest, generator)
        return spaces, moments, tokens

    def _matrix(
        self,
        matrix: ResidualMatrix,
        after: Float[Tensor, "d_out d_in"],
        before: Float[Tensor, "d_out d_in"],
        spaces: dict[Place, Subspace],
        moments: dict[Place, Tensor],
        tokens: int,
    ) -> Iterator[Row]:
        delta = (after - before).cpu()
        where = {"layer": matrix.layer, "matrix": matrix.kind, "role": matrix.role}
        yield row("delta_norm", delta.norm().item(), n=delta.numel(), **where)
        yield row("moved_share", (delta != 0).double().mean().item(), n=delta.numel(), **where)
        if not delta.any():  # nothing moved: no share of it lies anywhere
            return
        x = delta if matrix.role == "read" else delta.T
        for place, space in spaces.items():
            if place not in (_own(matrix), ("random", None)):
                continue
            moment = moments.get(place) if matrix.role == "read" and not self.centre_inputs else None
            for k in self.dimensions(x.shape[1]):
                at = where | {"subspace": place[0], "k": k}
                yield from self._compare(x, space.first(k), moment, tokens, at)

    def _compare(
        self, x: Float[Tensor, "n d"], space: Subspace, moment: Tensor | None, tokens: int, at: dict
    ) -> Iterator[Row]:
        d, k = space.basis.shape
        fraction = space.fraction(x)
        null: Null = rotation_null(x, k) if self.null_kind == "rotation" else isotropic_null(d, k, x.shape[0])
        n = x.numel()
        yield row("fraction", fraction, n=n, **at)
        yield row("ratio", fraction * d / k, n=n, **at)
        yield row("null_ratio_mean", null.mean * d / k, n=n, **at)
        yield row("null_ratio_sd", null.sd * d / k, n=n, **at)
        yield row("z", null.z(fraction), n=n, **at)
        yield row("p_value", null.p_value(fraction), n=n, **at)
        if moment is not None:
            yield row("matched_ratio", space.explained(moment.cpu()) * d / k, n=tokens, **at)


def _own(matrix: ResidualMatrix) -> Place:
    if matrix.role == "write":
        return "prediction", None
    return "attention_input" if matrix.kind in ("q", "k", "v") else "mlp_input", matrix.layer
