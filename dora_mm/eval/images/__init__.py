"""Evaluation of generated images: style, concept and CLIP similarity."""
