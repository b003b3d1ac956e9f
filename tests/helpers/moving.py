"""New weights from old ones, matrix by matrix."""

from collections.abc import Mapping

from torch import Tensor

from weightgeom.models.language_model import LanguageModel
from weightgeom.models.residual import ResidualMatrix
from weightgeom.params import Params


def matrix_of(model: LanguageModel, name: str) -> ResidualMatrix:
    return next(matrix for matrix in model.architecture.matrices if matrix.name == name)


def moved(model: LanguageModel, params: Params, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every named matrix plus its delta."""
    for name, delta in deltas.items():
        matrix = matrix_of(model, name)
        params = dict(matrix.replaced(params, matrix.of(params) + delta.float()))
    return dict(params)
