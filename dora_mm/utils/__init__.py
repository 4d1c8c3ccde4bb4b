"""What needs nothing else of ours: files and folders written at once, digests, seeded generators, YAML, text tables."""
