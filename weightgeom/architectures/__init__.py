"""Residual maps, one file per `model_type` of the transformers library."""
