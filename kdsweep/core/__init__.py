"""What every other part needs: errors of one line, signals, logs, progress, the device."""
