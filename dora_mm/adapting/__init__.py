"""Adapters and other trained parameters by a config's `adapter` section, for image and vision-language models."""
