"""Residual maps, one file per transformers ."""
