"""Fits the judge, which scores generated images for style and content."""
