"""Text to samples, deterministically."""
