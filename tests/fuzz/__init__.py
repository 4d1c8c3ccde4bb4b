"""Mutated files through every door: `make fuzz`. See docs/reliability.md."""
