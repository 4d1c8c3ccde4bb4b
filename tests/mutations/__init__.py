"""Faults in single lines of dora_mm that tests must notice: `make mutations`. See docs/developing.md."""
