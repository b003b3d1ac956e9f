"""The model's uncertainty: geometry of its hidden states by prompt group (arXiv:2603.13911)."""
