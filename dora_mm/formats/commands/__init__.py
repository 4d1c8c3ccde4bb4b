"""What the commands do with adapter files: inspect, verify, convert, extract."""
