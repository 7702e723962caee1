"""The `data` commands: inspect, count, verify, split, merge."""
