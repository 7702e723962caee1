"""Starts runs: the quickstart on one machine."""
