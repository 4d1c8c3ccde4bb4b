"""Files of predictions: ours and those of other programs, read, joined with references, compared and written."""
