"""Launcher: sweeps on this machine or under SLURM."""
