"""Calibration: how often p-values, intervals and verdicts err where the truth is known, by simulation."""
