"""Data sets: captioned images, vision-language examples and precomputed visual features."""
