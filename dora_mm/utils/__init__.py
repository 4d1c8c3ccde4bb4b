"""Atomic file writes, numbered folders, content digests, seeded generators, devices and text tables."""
