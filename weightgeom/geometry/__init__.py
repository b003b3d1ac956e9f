"""Geometry: subspaces, null distributions, Gram matrices, divergences and the bootstrap."""
