"""VL-BART: the model, its tokenizer and text, loading, and its adapters on disk."""
