"""Training: the loop, optimisers, checkpoints, run directories, validation and campaigns of many trainings."""
