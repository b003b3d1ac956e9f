"""Bases: the models that a run starts from (the embedded one, pretrained ones, pairs and chains)."""
