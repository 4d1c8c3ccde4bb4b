"""Helpers that import nothing else of dora_mm: atomic files and folders, digests, seeded generators, YAML, tables."""
