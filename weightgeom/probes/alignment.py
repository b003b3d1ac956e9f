"""Alignment of the successive updates of a training or of a chain, and the locking of their subspaces."""

# pandas types the results of indexing and grouping as unions of everything they may ever be.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.analysis.chain import STAGES
from weightgeom.declarations import ProbeDeclaration
from weightgeom.estimators.alignment import (
    ENERGY,
    NULLS,
    Aligned,
    Leading,
    aligned,
    leading,
    overlap,
    pooled,
    top_right,
)
from weightgeom.estimators.given_subspaces import (
    Frames,
    check_frame_prompts,
    check_frames,
    given_subspaces,
)
from weightgeom.geometry.nulls import rotated
from weightgeom.geometry.subspace import Subspace
from weightgeom.interfaces import Setting
from weightgeom.models.residual import Architecture, ResidualMatrix
from weightgeom.params import Params
from weightgeom.table import Row, of_the_model, row
from weightgeom.text.examples import Examples

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Pair = tuple[int, int]  # the steps at which two updates end


@dataclass(frozen=True)
class Alignment:
    """Updates between neighbouring checkpoints, every one against every other, and cumulative updates.

    In a chain they are the updates of its stages. The column `step` is the step at which the first update A
    ends, `against` that of the other, B. Rows without a matrix are over all matrices of the residual stream,
    as they reach it. All rows are made at the last checkpoint, from all of them; two checkpoints have none.

    With `frames`, further subspaces by name (`weightgeom.estimators.given_subspaces`), the parts of A and B
    inside each are compared likewise: dW U of a matrix that reads and Uᵀ dW of one that writes.

    Quantities, all of unit 1:
        cosine, orthogonal_share, mode_overlap: of A and an earlier B (`weightgeom.estimators.alignment`).
        alignment_ratio: of A and an earlier or a later B, ‖P A‖ / ‖A‖, P onto the left singular vectors of B
            that hold `energy` of its energy.
        previous_cosine: the cosine with the update before.
        locking: ‖V_K(t)ᵀ V_K(end)‖²_F / K, in [0, 1], with V_K(t) the top K right singular vectors of the
            update from the start to t; the column `k` is K, or the rank if it is smaller. arXiv:2606.07082.
        frame_cosine, frame_orthogonal_share, frame_alignment_ratio, frame_mode_overlap: the first four, of
            the parts inside a given subspace, whose name is in the column `subspace`; their nulls,
            frame_null_..._mean and frame_null_..._sd, rotate within the subspace.
        null_..._mean, null_..._sd: of each but orthogonal_share, under random rotations, in closed form: of
            locking the mean is K/d. Source: ours.
        walk_locking_mean, walk_locking_sd: of locking, where the rest of the update, from t to the end, is
            rotated at random: the end holds the update to t, so that a random walk locks as well. Of `draws`
            samples. Source: ours.
    """

    declaration: ClassVar[ProbeDeclaration] = ProbeDeclaration(
        "previous_cosine",
        section="Alignment of updates",
        whole=("previous_cosine",),
        compares=False,
        generic=False,
    )

    energy: float = Field(default=ENERGY, gt=0, le=1)  # of an update, in its leading directions
    k: int = Field(default=16, ge=1)  # directions of locking
    draws: int = Field(default=3, ge=2)  # of the rest of an update, a decomposition each
    frames: Frames = Field(
        default_factory=dict
    )  # further subspaces by name: a file, or two groups of prompts
    most: int = Field(default=12, ge=2)  # updates; of more checkpoints those at evenly spread places

    def check(self, architecture: Architecture) -> None:
        """Refuse given subspaces that do not fit."""
        check_frames(self.frames, architecture, "probe.alignment.frames")

    def check_examples(self, examples: Examples) -> None:
        """Refuse groups of prompts that are missing or too small."""
        check_frame_prompts(self.frames, examples, "probe.alignment.frames")

    def summary(self, table: "pd.DataFrame") -> "pd.DataFrame":
        """Every pair of updates over all matrices, with the nulls."""
        import pandas as pd

        names = named_updates(table)
        whole = _over_matrices(table).pivot(index=["step", "against"], columns="quantity", values="value")
        lines = []
        pairs = whole[whole["cosine"].notna()]
        for step, against in sorted(pairs.index, key=lambda pair: (pair[0], int(pair[1]))):
            part = pairs.loc[step, against]
            line = {"update": names[int(step)], "against": names[int(against)]}
            for quantity in NULLS:
                mean, sd = part[f"null_{quantity}_mean"], part[f"null_{quantity}_sd"]
                line[quantity] = f"{part[quantity]:.3g} ({mean:.2g} ± {sd:.1g})"
            lines.append(line | {"orthogonal_share": f"{part['orthogonal_share']:.3g}"})
        return pd.DataFrame(lines)

    def figures(self, tables: "Mapping[str, pd.DataFrame]") -> "Mapping[str, Figure]":
        """All pairs as heat maps, and locking by step."""
        from weightgeom.figures.alignment import heat_maps, locking

        table = tables.get("training")
        if table is None:
            return {}
        pairs = _over_matrices(table)
        pairs = pairs[pairs["against"] != ""]
        return {"alignment": heat_maps(pairs, named_updates(table)), "locking": locking(table)}

    def measurement(self, setting: Setting) -> Callable[[Params], list[Row]]:
        """The measurement: everything at the last checkpoint, nothing at the others."""
        matrices = setting.model.architecture.matrices
        made = False

        def measure(params: Params) -> list[Row]:
            nonlocal made
            last = all(
                torch.equal(params[matrix.parameter], setting.end[matrix.parameter]) for matrix in matrices
            )
            if made or not last or len(setting.checkpoints) < 3:
                return []
            made = True
            return list(self._rows(setting))

        return measure

    def _rows(self, setting: Setting) -> Iterator[Row]:
        steps = list(setting.checkpoints)
        places = torch.linspace(0, len(steps) - 1, min(len(steps), self.most + 1)).round().int().tolist()
        chosen = [steps[place] for place in places]
        opened = {step: setting.checkpoints[step] for step in chosen}
        generator = torch.Generator().manual_seed(setting.seed)
        given = given_subspaces(self.frames, setting, min(self.k, setting.model.architecture.d_model))
        whole: dict[Pair, list[Aligned]] = {}
        inside: dict[tuple[Pair, str], list[Aligned]] = {}
        for matrix in setting.model.architecture.matrices:
            weights = {step: _written(matrix, params) for step, params in opened.items()}
            changes = {step: weights[step] - weights[before] for before, step in pairwise(chosen)}
            updates = self._leading(changes)
            place = matrix.table_columns
            for pair, alignment in _pairs(updates).items():
                whole.setdefault(pair, []).append(alignment)
                yield from pair_rows(pair, [alignment], chosen, **place)
            for subspace in given:
                space = subspace.at(matrix)
                if space is None:
                    continue
                parts = {step: _inside(matrix, change, space) for step, change in changes.items()}
                for pair, of_matrix in _pairs(self._leading(parts)).items():
                    inside.setdefault((pair, subspace.name), []).append(of_matrix)
                    yield from _frame_rows(pair, [of_matrix], chosen, subspace=subspace.name, **place)
            yield from self._locking(weights, chosen, matrix, generator)
        for pair, parts in whole.items():
            yield from pair_rows(pair, parts, chosen)
        for (pair, name), parts in inside.items():
            yield from _frame_rows(pair, parts, chosen, subspace=name)

    def _leading(self, updates: Mapping[int, Tensor]) -> dict[int, Leading]:
        parts = {step: leading(update, self.energy) for step, update in updates.items()}
        return {step: part for step, part in parts.items() if part is not None}

    def _locking(
        self,
        weights: Mapping[int, Tensor],
        chosen: list[int],
        matrix: ResidualMatrix,
        generator: torch.Generator,
    ) -> Iterator[Row]:
        first, *between, last = chosen
        end = top_right(weights[last] - weights[first], self.k)
        for step in between:
            update = weights[step] - weights[first]
            space = top_right(update, self.k)
            if space is None or end is None:
                continue
            k = min(space.shape[1], end.shape[1])
            values = zip(
                ("locking", "null_locking_mean", "null_locking_sd"), overlap(space, end), strict=True
            )
            for name, value in values:
                yield row(name, value, n=k, k=k, step=step, **matrix.table_columns)
            walk = walked(update, weights[last] - weights[step], space, self.k, self.draws, generator)
            for name, value in (("mean", walk.mean()), ("sd", walk.std())):
                place: dict[str, Any] = {"k": k, "step": step, **matrix.table_columns}
                yield row(f"walk_locking_{name}", float(value), n=self.draws, **place)


def walked(
    update: Float[Tensor, "d_out d_in"],
    rest: Float[Tensor, "d_out d_in"],
    space: Float[Tensor, "d_in _"],
    k: int,
    draws: int,
    generator: torch.Generator,
) -> Float[Tensor, " draws"]:
    """Overlap of an update's leading directions, `space`, with those after a rest in random directions."""
    overlaps = []
    for _ in range(draws):
        end = top_right(update + rotated(rest, generator), k)
        overlaps.append(0.0 if end is None else overlap(space, end)[0])
    return torch.tensor(overlaps, dtype=torch.float64)


def _over_matrices(table: "pd.DataFrame") -> "pd.DataFrame":
    rows = of_the_model(table)
    return rows[rows["subspace"] == ""]


def _written(matrix: ResidualMatrix, params: Params) -> Float[Tensor, "d_out d_in"]:
    return matrix.written(params).float().cpu()


def _inside(matrix: ResidualMatrix, update: Float[Tensor, "d_out d_in"], space: Subspace) -> Tensor:
    basis = space.basis.to(update)
    return update @ basis if matrix.role == "read" else basis.T @ update


def _frame_rows(pair: Pair, parts: list[Aligned], chosen: list[int], **place: Any) -> Iterator[Row]:
    for entry in pair_rows(pair, parts, chosen, **place):
        yield entry | {"quantity": f"frame_{entry['quantity']}"}


def _pairs(updates: Mapping[int, Leading]) -> dict[Pair, Aligned]:
    return {
        (step, other_step): aligned(updates[step], updates[other_step])
        for step in updates
        for other_step in updates
        if step != other_step
    }


def pair_rows(pair: Pair, parts: list[Aligned], chosen: list[int], **place: Any) -> Iterator[Row]:
    """The rows of two updates, A and B; those that do not depend on their order only of an earlier B."""
    step, against = pair
    values, n = pooled(parts), sum(part.entries for part in parts)
    for name, value in values.items():
        if against < step or "alignment_ratio" in name:
            yield row(name, value, n=n, step=step, against=str(against), **place)
    if chosen.index(step) == chosen.index(against) + 1:
        for name in ("cosine", "null_cosine_mean", "null_cosine_sd"):
            renamed = name.replace("cosine", "previous_cosine")
            yield row(renamed, values[name], n=n, step=step, **place)


def named_updates(table: "pd.DataFrame") -> dict[int, str]:
    """The name of every update by the step at which it ends: `stage`, or `step 4`."""
    ends = {int(step) for step in table["step"]} | {int(step) for step in table["against"] if step != ""}
    stages = table.attrs.get(STAGES)
    return {step: f"step {step}" if stages is None else stages[step] for step in sorted(ends)}
