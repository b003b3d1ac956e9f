"""Estimators: moments, gradients, updates, hidden states and reference subspaces of a model."""
