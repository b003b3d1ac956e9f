"""Bases: the models that a run starts from (embedded, pretrained, pairs and chains of checkpoints)."""
