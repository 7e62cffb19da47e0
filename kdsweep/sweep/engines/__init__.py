"""What runs a sweep's groups: processes of this machine, SLURM, Ray."""
