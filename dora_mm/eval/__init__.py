"""Evaluation: intervals, comparisons of methods, timing, and the metrics of images and of answers."""
