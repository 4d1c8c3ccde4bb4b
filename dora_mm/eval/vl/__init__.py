"""Evaluation of vision-language predictions: metrics, submission files, comparisons and the page of examples."""
