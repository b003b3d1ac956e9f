"""The grids that stored weights are on, through the views that checkpoints are read by."""

from jaxtyping import Float
from torch import Tensor

from weightgeom.models.vocabulary import Aligned
from weightgeom.models.weights import Dequantised
from weightgeom.params import Params


def spacing_of(params: Params, name: str) -> Float[Tensor, "..."] | None:
    """The distance of neighbouring values of a quantised weight's grid, entry by entry; None for others.

    A weight in half precision has a grid as well, which its dtype tells.
    """
    if isinstance(params, Dequantised):
        return params.spacing(name)
    if isinstance(params, Aligned) and name not in params.vocabulary:
        return spacing_of(params.params, params.sources[name])
    return None
