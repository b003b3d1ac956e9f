"""Weights as a mapping from parameter names to tensors: the one form of weights, updates and gradients."""

from collections.abc import Mapping

from torch import Tensor

Params = Mapping[str, Tensor]
"""Weights, updates, gradients or moments by parameter name, in memory or read lazily from disk."""
