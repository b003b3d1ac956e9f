"""Reports: the tables, figures and HTML page of MLflow experiments."""

from runners.report.read import collect

__all__ = ["collect"]
