"""Hands jobs to what places them on hosts, such as Slurm; the exports directory stays the only truth."""
