"""Engines that run a sweep's groups: processes of this machine, SLURM, Ray."""
