"""Runs on a Slurm cluster: the job script, its submission, and what has become of it."""
