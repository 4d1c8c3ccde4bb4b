"""Sampling: images from diffusion models, and answers from vision-language models."""
