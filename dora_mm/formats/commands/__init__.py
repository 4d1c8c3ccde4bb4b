"""The implementation of the commands on adapter files: inspect, verify, convert, extract and others."""
