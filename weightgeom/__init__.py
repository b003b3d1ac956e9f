"""The geometry of transformer weights: what a training stage did to the matrices of a model."""
