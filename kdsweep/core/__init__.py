"""Foundations of all other rooms: errors, files, signals, logs, progress, the device."""
