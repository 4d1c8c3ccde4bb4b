"""Evaluation of vision-language predictions: metrics, intervals, submission files and the page of examples."""
