"""Causal tests: weight edits, matched controls and their effects."""
