"""Starts runs: the quickstart on one machine, and jobs of Slurm."""
