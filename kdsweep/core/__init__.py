"""Foundations of all other packages: errors, files, signals, logs, progress, the device."""
