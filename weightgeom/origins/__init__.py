"""Which kind of training made an update, judged from the two checkpoints alone."""
