"""`Params`: weights, updates and gradients alike, as a mapping from parameter names to tensors."""

from collections.abc import Mapping

from torch import Tensor

Params = Mapping[str, Tensor]
"""Weights, updates, gradients or moments by parameter name, in memory or read lazily from disk."""
