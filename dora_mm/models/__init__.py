"""Models: a folder or a file per family, which opens a model and encodes its inputs; nothing else does."""
