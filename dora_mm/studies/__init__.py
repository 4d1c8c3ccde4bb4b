"""What compares methods of training and asks the paper's questions; only `compare`, `analyse` and `tune` import it."""
