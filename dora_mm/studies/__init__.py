"""Comparisons of training methods, and the paper's analyses; only `compare`, `analyse` and `tune` import it."""
