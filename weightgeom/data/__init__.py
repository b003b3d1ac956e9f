"""Data, one file per choice of ."""
