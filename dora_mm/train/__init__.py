"""Training: the loop, optimisers, checkpoints, runs, validation and campaigns of many trainings."""
