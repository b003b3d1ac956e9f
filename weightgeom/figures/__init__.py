"""Figures: result tables in, matplotlib figures out."""
