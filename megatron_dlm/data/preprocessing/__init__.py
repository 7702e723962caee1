"""The `preprocess` command: text to shards, resumable, in many processes and array tasks."""
