"""Objectives, one file per choice of `objective=`."""
