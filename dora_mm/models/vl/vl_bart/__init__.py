"""VL-BART: the model, its text and visual inputs, loading, losses and answers."""
