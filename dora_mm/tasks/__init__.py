"""Tasks: batches of a model family and the loss of a batch."""
