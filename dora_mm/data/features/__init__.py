"""Precomputed visual features: writing them, and reading them from several kinds of files."""
