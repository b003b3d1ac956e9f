"""Loss and divergence along the line through the weights before and after an update."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.bases.outline import Shape
from weightgeom.declarations import ProbeDeclaration
from weightgeom.estimators.held_out import HeldOut, held_out, over_tokens, predictions
from weightgeom.interfaces import Setting
from weightgeom.models.residual import Architecture
from weightgeom.params import Params
from weightgeom.table import Row, row
from weightgeom.text.tokens import Batch, packed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from weightgeom.models.language_model import LanguageModel

BATCH_TOKENS = 512  # whose logits are in memory, beside those of the start at all tokens
SHOWN = {"path_ce": "loss", "path_ce_rise": "rise", "path_kl": "KL"}  # in the terminal
Held = Mapping[str, Tensor]


@dataclass(frozen=True)
class Connectivity:
    """Held-out loss and KL at W(t) = W₀ + t dW, with all parameters of the model, against random directions.

    The column `dose` is t; 0 is the trajectory's start and 1 the checkpoint, exactly. A random direction has
    iid Gaussian entries with the norm of dW in every matrix, and in every other parameter. A checkpoint that
    is the start has no rows. Source: arXiv:2606.23740; the null is ours.

    Quantities, in nats per token on held-out text:
        path_ce: -log p(token | before), >= 0, as in the probe `behaviour`.
        path_ce_rise: that less the loss at t = 0; its error is that of the difference, text by text.
        path_kl: KL(W₀ || W(t)) of the next-token predictions, >= 0.
        barrier: the most by which the loss at 0 <= t <= 1 exceeds the line between its ends, >= 0. Frankle
            et al. (2020), arXiv:1912.05671.
        null_..._mean, null_..._sd: of each, over `draws` random directions.
    """

    declaration: ClassVar[ProbeDeclaration] = ProbeDeclaration(
        headline="", section="Connectivity", whole=("barrier",), generic=False, divisible=True
    )

    t: list[float] = Field(default=[0, 0.25, 0.5, 0.75, 1, 1.25, 1.5])
    draws: int = Field(default=3, ge=2)  # of random directions
    tokens: int = Field(default=512, ge=2)  # of held-out text
    length: int = Field(default=96, ge=2)  # tokens a sequence

    def __post_init__(self) -> None:
        """Refuse a path without its ends."""
        if not {0.0, 1.0} <= set(self.t):
            raise ValueError(
                f"probe.connectivity.t must include 0 and 1, the weights before and after, got {self.t}"
            )

    def check(self, architecture: Architecture) -> None:
        """Every model will do."""

    def held(self, shape: Shape, objective: bool) -> float:
        """Both ends, a direction and a point, the logits of the start and, twice, of a batch, and slices."""
        batch = min(self.tokens, max(BATCH_TOKENS, self.length))
        logits = self.tokens + 2 * batch + 4 * min(batch, 256)
        return 4 * shape.weights + shape.logits(logits)

    def summary(self, table: "pd.DataFrame") -> "pd.DataFrame":
        """Loss and KL at every t of the last step, with their nulls."""
        import pandas as pd

        last = table[table["step"] == table["step"].max()]
        by_dose = last[last["dose"] != ""].pivot(index="dose", columns="quantity", values="value")
        lines = []
        for dose in sorted(by_dose.index, key=float):
            line = {"t": dose}
            for quantity, name in SHOWN.items():
                value, mean, sd = (
                    by_dose.loc[dose, end]
                    for end in (quantity, f"null_{quantity}_mean", f"null_{quantity}_sd")
                )
                line[name] = f"{value:.3g}"
                line[f"{name}, random"] = f"{mean:.3g} ± {sd:.1g}"
            lines.append(line)
        return pd.DataFrame(lines)

    def figures(self, tables: "Mapping[str, pd.DataFrame]") -> "Mapping[str, Figure]":
        """Loss and KL by t at the last step, with the band of random directions."""
        from weightgeom.figures.connectivity import paths

        return {"connectivity": paths(tables["training"])} if "training" in tables else {}

    def measurement(self, setting: Setting) -> Callable[[Params], list[Row]]:
        """The measurement of one checkpoint."""
        model = setting.model
        batches = [
            batch.to(model.device)
            for batch in packed(
                *(setting.examples.heldout, model.tokenizer, self.length, self.tokens),
                size=max(1, BATCH_TOKENS // self.length),
            )
        ]
        start = model.hold(setting.start)

        def measure(params: Params) -> list[Row]:
            before, after = ends(model, start, model.hold(params))
            if all(torch.equal(before[name], after[name]) for name in before):
                return []
            return list(self._rows(model, before, after, batches, setting.seed))

        return measure

    def _rows(
        self, model: "LanguageModel", before: Held, after: Held, batches: Sequence[Batch], seed: int
    ) -> Iterator[Row]:
        then = [predictions(model, before, batch) for batch in batches]
        first = held_out(model, before, then, batches)

        def path(point: Callable[[float], Held]) -> dict[str, list[Row]]:
            return self._path(
                [held_out(model, point(t), then, batches) if t else first for t in self.t], first
            )

        line = path(lambda t: {name: torch.lerp(before[name], after[name], t) for name in before})
        random = []
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.draws):
            direction = random_direction(model.architecture, before, after, generator)
            random.append(path(_from(before, direction)))
        losses = line["path_ce"]
        yield row("barrier", barrier(self.t, _values(losses)), n=losses[0]["n"], unit="nats/token")
        yield from _null("barrier", [barrier(self.t, _values(drawn["path_ce"])) for drawn in random])
        for quantity, rows in line.items():
            for index, t in enumerate(self.t):
                yield {**rows[index], "dose": f"{t:g}"}
                values = [drawn[quantity][index]["value"] for drawn in random]
                yield from _null(quantity, values, dose=f"{t:g}")

    def _path(self, points: Sequence[HeldOut], first: HeldOut) -> dict[str, list[Row]]:
        """The rows of every quantity, one for each t; `first` is at t = 0."""
        return {
            "path_ce": [over_tokens("path_ce", at.losses, at.tokens) for at in points],
            "path_ce_rise": [_rise(at, first) for at in points],
            "path_kl": [over_tokens("path_kl", at.divergences, at.tokens) for at in points],
        }


def _rise(at: HeldOut, first: HeldOut) -> Row:
    return over_tokens("path_ce_rise", at.losses - first.losses, at.tokens)


def barrier(path: Sequence[float], losses: Sequence[float]) -> float:
    """The most by which losses at 0 <= t <= 1 exceed the line between those at 0 and at 1, >= 0."""
    at = dict(zip(path, losses, strict=True))
    return max(loss - ((1 - t) * at[0] + t * at[1]) for t, loss in at.items() if 0 <= t <= 1)


def _from(start: Held, direction: Held) -> Callable[[float], Held]:
    return lambda t: {name: start[name] + t * direction[name] for name in start}


def _values(rows: Sequence[Row]) -> list[float]:
    return [row["value"] for row in rows]


def ends(model: "LanguageModel", before: Held, after: Held) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of two models under the same names; a tied unembedding is the embedding where one is untied."""
    embed = model.architecture.embed
    names = dict.fromkeys([*before, *after])
    start, end = ({name: held.get(name, held[embed]) for name in names} for held in (before, after))
    return start, end


def random_direction(
    architecture: Architecture, before: Held, after: Held, generator: torch.Generator
) -> dict[str, Tensor]:
    """iid Gaussian entries with the norm that after - before has in every matrix or other parameter.

    Matrices that are fused into one parameter, and the experts in a stack, have norms of their own.
    """
    direction = {}
    for name, start in before.items():
        update = after[name] - start
        drawn = torch.randn(start.shape, generator=generator).to(start)
        axes = (-2, -1) if drawn.ndim > 1 else (-1,)
        direction[name] = drawn * (_norm(update, axes) / _norm(drawn, axes))
    for matrix in architecture.matrices:
        if matrix.rows is None or matrix.parameter not in direction:
            continue
        old, new, drawn = (matrix.of(weights) for weights in (before, after, direction))
        size = torch.linalg.vector_norm(drawn)
        if size > 0:
            scaled = drawn * (torch.linalg.vector_norm(new - old) / size)
            direction = dict(matrix.replaced(direction, scaled))
    return direction


def _norm(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(x, dim=axes, keepdim=True) if x.ndim else x.abs()


def _null(quantity: str, values: Sequence[float], **place: Any) -> Iterator[Row]:
    drawn = torch.tensor(values, dtype=torch.float64)
    for name, value in (("mean", drawn.mean()), ("sd", drawn.std())):
        yield row(f"null_{quantity}_{name}", float(value), n=len(drawn), unit="nats/token", **place)
