"""Commands killed at every file event, and repeated: `make kill`. See docs/reliability.md."""
