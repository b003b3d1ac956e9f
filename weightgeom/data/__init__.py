"""Data sets, one file per choice of `data=`."""
