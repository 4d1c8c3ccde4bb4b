"""Models: one folder per family, which loads and encodes; nothing else does."""
