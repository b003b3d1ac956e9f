"""Objectives: one file for each choice of `objective=`."""
