"""Measurements of one update that need no text, against nulls or wholes so that its size matters little."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import log, sqrt
from typing import TYPE_CHECKING

import numpy as np
import torch

from weightgeom.estimators.other_parameters import Change, change_of, other_parameters
from weightgeom.estimators.per_matrix import PerMatrix
from weightgeom.estimators.reference_subspaces import prediction_frame
from weightgeom.estimators.rotation import rotation_test
from weightgeom.interfaces import Setting
from weightgeom.models.loading import unloaded
from weightgeom.models.residual import Architecture
from weightgeom.params import Params
from weightgeom.probes.rotation import Rotation
from weightgeom.probes.sparsity import Sparsity
from weightgeom.probes.spectrum import Spectrum, ranks
from weightgeom.table import Row
from weightgeom.text.examples import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from weightgeom.models.language_model import LanguageModel

KINDS = ("q", "k", "v", "o", "up", "down")
SIZE = "relative_norm"  # ‖dW‖ / ‖W‖ over all matrices: measured, and no feature
PROBES = (
    Spectrum(of=["delta"], top=1, shuffles=0),
    Rotation(curve=0, draws=4),
    PerMatrix(Sparsity()),  # pyright: ignore[reportArgumentType] (its headline is a constant of the class)
)
# Quantities of these probes whose logarithm is compared with that of their null, and those that are shares.
OVER_NULL = ("delta_stable_rank", "delta_effective_rank", "left_angle", "right_angle", "spectral_shift")
MINUS_NULL = ("intruders", "invisible_share", "low_overlap", "principal_overlap")
LEADING = 10  # directions among which the probe `rotation` counts intruders
LEAST = 1e-6  # of a ratio before its logarithm


def features(before: Params, after: Params, config: "PreTrainedConfig", seed: int = 0) -> dict[str, float]:
    """The measurements of the update between two checkpoints of one config, by name; all of unit 1.

    Of each kind of matrix at the residual stream, the mean over layers of
        size: ln of ‖dW‖ / ‖W‖ over that of all matrices together.
        delta_stable_rank, delta_effective_rank, left_angle, right_angle, spectral_shift: ln of the quantity
            over the mean of its null, Gaussian entries for the ranks, rotated dW of equal spectrum for the
            others.
        intruders (a share of ten), invisible_share, low_overlap, principal_overlap: minus their nulls.
        write_ratio: ln of the ratio in the prediction subspace, of o and down.
    Of the embedding, the unembedding, the gains and the biases: `share`, r / (r + r_0), with r the relative
    norm of their update and r_0 that of all matrices, in [0, 1]. Of the embedding and the unembedding also
    `moved_share`, `rows`, the participation ratio of the squared norms of rows over their number, and `rank`,
    the effective rank over d; all are 0 where nothing moved. `profile` is the difference of ln ‖dW‖ / ‖W‖
    between the last layer and the first. Sources: the probes `spectrum`, `rotation`, `sparsity` and `rsf`;
    the choice is ours. `relative_norm` is the size of the update, which is no feature.

    Raises:
        NotImplementedError: if the model type has no residual-stream map.
        ValueError: if no matrix has moved, or the model lacks a kind of matrix.
    """
    # No measurement here reads text.
    model = unloaded(config, None, torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    setting = Setting(model, before, after, False, Examples("none", [], [], [], [], digest=""), seed)
    with torch.no_grad():
        sizes = _sizes(model.architecture, before, after)
        whole = _relative(size for _, _, size in sizes)
        if not whole > 0:
            raise ValueError("no matrix of the residual stream has moved between the two checkpoints")
        measured = {SIZE: whole}
        measured |= _by_kind(setting, after, sizes, whole)
        measured |= _profile(sizes)
        measured |= _others(model, before, after, whole)
    return measured


Size = tuple[float, float]  # squared norms of an update and of the matrix before it


def _sizes(architecture: Architecture, before: Params, after: Params) -> list[tuple[int, str, Size]]:
    sizes = []
    for matrix in architecture.matrices:
        old, new = (matrix.of(params).double() for params in (before, after))
        sizes.append((
            matrix.layer, matrix.kind, (float((new - old).square().sum()), float(old.square().sum())),
        ))  # fmt: skip
    return sizes


def _relative(sizes: Iterable[Size]) -> float:
    squares = np.array(list(sizes)).sum(0)
    return sqrt(squares[0] / squares[1]) if squares[1] > 0 else 0.0


def _by_kind(
    setting: Setting, after: Params, sizes: list[tuple[int, str, Size]], whole: float
) -> dict[str, float]:
    """The means over layers of each kind of matrix."""
    values: dict[str, list[float]] = defaultdict(list)
    for _, kind, size in sizes:
        values[f"size.{kind}"].append(_log(_relative([size]) / whole))
    rows = [row for probe in PROBES for row in probe.measurement(setting)(after)]
    for (_, kind), measured in _grouped(rows).items():
        for name in (name for name in OVER_NULL if name in measured):  # an unmoved matrix has no such rows
            values[f"{name}.{kind}"].append(_log(measured[name]) - _log(measured[f"null_{name}_mean"]))
        for name in MINUS_NULL:
            if name in measured:  # no overlap where nothing is visible
                scale = LEADING if name == "intruders" else 1
                values[f"{name}.{kind}"].append((measured[name] - measured[f"null_{name}_mean"]) / scale)
    architecture = setting.model.architecture
    space = prediction_frame(setting, setting.start, max(1, architecture.d_model // 8)).space
    for matrix in architecture.matrices:
        update = matrix.written(after).float() - matrix.written(setting.start).float()
        if matrix.role == "write" and bool(update.any()):
            test = rotation_test(update, space, side="write")
            values[f"write_ratio.{matrix.kind}"].append(_log(test.ratio))
    names = [f"{name}.{kind}" for name in ("size", *OVER_NULL, *MINUS_NULL) for kind in KINDS]
    names += [f"write_ratio.{kind}" for kind in ("o", "down")]
    return {name: float(np.mean(values[name])) if values[name] else 0.0 for name in names}


def _grouped(rows: Iterable[Row]) -> Mapping[tuple[int, str], dict[str, float]]:
    """The quantities of every matrix, by its layer and kind."""
    grouped: dict[tuple[int, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        grouped[row["layer"], row["matrix"]][row["quantity"]] = row["value"]
    return grouped


def _profile(sizes: list[tuple[int, str, Size]]) -> dict[str, float]:
    """The change of the relative norm from the first layer to the last."""
    last = max(layer for layer, _, _ in sizes)
    ends = [_relative(size for layer, _, size in sizes if layer == end) for end in (0, last)]
    return {"profile": _log(ends[1]) - _log(ends[0])}


def _others(model: "LanguageModel", before: Params, after: Params, whole: float) -> dict[str, float]:
    """Parameters outside of the matrices at the residual stream."""
    squares: dict[str, list[Size]] = defaultdict(list)
    measured = {}
    for parameter in other_parameters(model, before):
        by_row = parameter.kind in ("embed", "unembed")
        change = change_of(parameter.name, after, before, by_row=by_row)
        squares[parameter.kind].append((change.norm**2, change.before_norm**2))
        if by_row:
            measured |= {f"{name}.{parameter.kind}": value for name, value in _of_embedding(change).items()}
    for kind in ("embed", "unembed", "norm", "bias"):
        relative = _relative(squares[kind]) if squares[kind] else 0.0
        measured[f"share.{kind}"] = relative / (relative + whole)
    return measured


def _of_embedding(change: Change) -> dict[str, float]:
    if not change.norm > 0:
        return {"moved_share": 0.0, "rows": 0.0, "rank": 0.0}
    assert change.lengths is not None and change.gram is not None
    lengths, gram = change.lengths.cpu(), change.gram.cpu().double()
    spectrum = torch.linalg.eigvalsh(gram).clamp(min=0)
    return {
        "moved_share": change.moved_share,
        "rows": ranks(lengths.square())["participation_ratio"] / len(lengths),
        "rank": ranks(spectrum)["effective_rank"] / len(gram),
    }


def _log(value: float) -> float:
    return log(max(value, LEAST))
