"""Data sets: one file for each choice of `data=`."""
