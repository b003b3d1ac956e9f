"""How much of an update is the rounding of the checkpoints that it is the difference of."""

import logging
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from weightgeom.interfaces import Row

log = logging.getLogger(__name__)
EXPONENT = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}  # its bits: alone, they are the power of two
MOSTLY = 0.5  # of an update's energy (ours)


def is_rounded(weight: Tensor) -> bool:
    """Whether a weight is stored in half precision."""
    return weight.dtype in EXPONENT


def rounding_energy(weight: Float[Tensor, "..."], gain: Float[Tensor, "..."] | None = None) -> float:
    """What rounding to the stored dtype adds to ‖W‖²_F in expectation: Σ ulp²/12, in units of the weights.

    The error of rounding to nearest is uniform on an interval of one unit in the last place (ulp), whose
    variance is ulp²/12; zero for fp32 and better. `gain` multiplies the rows that it is broadcast over.
    """
    if not is_rounded(weight):
        return 0.0
    power = (weight.view(torch.int16) & EXPONENT[weight.dtype]).view(weight.dtype).float()
    ulp = power if gain is None else power * gain
    return float(torch.linalg.vector_norm(ulp)) ** 2 * torch.finfo(weight.dtype).eps ** 2 / 12


def warn_of_rounding(rows: Sequence[Row]) -> None:
    """Say so in the log if updates, by their rows `rounding_share`, are mostly rounding."""
    shares = [row["value"] for row in rows if row["quantity"] == "rounding_share"]
    mostly = sum(share > MOSTLY for share in shares)
    if mostly:
        log.warning(
            "%d of %d updates are mostly rounding (rounding_share over %g): they are too small for the"
            " half precision that the checkpoints are stored in, so compare fp32 ones",
            *(mostly, len(shares), MOSTLY),
        )
