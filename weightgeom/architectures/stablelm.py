"""StableLM."""

from typing import TYPE_CHECKING

from weightgeom.models.decoder import decoder
from weightgeom.models.residual import Architecture

if TYPE_CHECKING:
    from transformers import StableLmConfig


def architecture(config: "StableLmConfig") -> Architecture:
    """Llama's map with LayerNorms; in some attention and MLP are side by side behind one of them.

    Where q and k are normed, it is per head after the projection, which the map leaves out.
    """
    return decoder(config, parallel=config.use_parallel_residual)
