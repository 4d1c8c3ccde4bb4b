"""What compares methods of training and asks the paper's questions; only `compare` and `analyse` import it."""
