"""Evaluation: intervals, comparisons of methods, and the metrics of images and of answers."""
