"""Interventions, one file per choice of `intervention=`."""
