"""Uncertainty of the model: geometry of hidden states by prompt group (arXiv:2603.13911)."""
