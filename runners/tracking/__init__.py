"""Tracking: the record of a run on disk, and its publication to MLflow."""
