"""Reckoning about runs: what one costs and what many of them show. Imports no torch."""
