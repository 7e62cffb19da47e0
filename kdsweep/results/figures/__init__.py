"""Figures of a sweep: each but figure2 has a module of its name."""

FIGURES = {
    "figure2": "contours of all models on test images",
    "effects": "test DSC of each cell, and the main effects",
    "curves": "validation Dice over the epochs",
    "pairs": "each test image against Student",
    "capacity": "test DSC of Students of several sizes against parameters and latency",
    "tuning": "best validation Dice against the seconds that a method's trials took",
}
