"""Executors, which compute lockstep groups: processes of this machine, SLURM, Ray."""
