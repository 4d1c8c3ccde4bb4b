"""SDXL: loading, and encoding of prompts and images."""
