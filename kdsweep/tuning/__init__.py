"""Tuning: which settings are tried, which trials end early, and which are chosen."""
