"""Probes, one file per choice of `probe=`."""
