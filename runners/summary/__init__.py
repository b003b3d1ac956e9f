"""Summaries: MLflow curves, figures, notes and terminal tables of a run or a sweep."""
