"""Scores of a trained network on each image, and the time that networks take."""
