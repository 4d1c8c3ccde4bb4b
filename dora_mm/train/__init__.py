"""Training: the loop, optimisers, checkpoints, runs and validation."""
