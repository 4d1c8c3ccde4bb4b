"""Fits the classifier, which scores generated images for style and content."""
