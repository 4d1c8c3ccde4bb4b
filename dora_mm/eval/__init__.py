"""Evaluation: intervals, the metrics of images and of answers, and the shape of gradients."""
