"""kdsweep: one command runs a knowledge-distillation ablation for small segmentation networks."""

__version__ = "0.1.0"
