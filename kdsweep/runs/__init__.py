"""The folder of a run: what it tells, who computes it, and files that appear whole or not at all."""
