"""Architectures, tokenizers, captions and losses of the small models that are pretrained here."""
