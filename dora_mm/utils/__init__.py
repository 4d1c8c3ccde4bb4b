"""Atomic file writes, content digests, seeded generators, devices and text tables."""
