"""Models: residual-stream maps, weights on disk, adapters and loading."""
