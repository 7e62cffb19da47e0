"""kdsweep: one command runs a knowledge-distillation ablation for small segmentation networks.

Where a docstring says PAPER, it means Behboodi, Brooks, Rivaz: Optimizing knowledge distillation for efficient breast
ultrasound image segmentation. Artificial Intelligence in Health 2(2), 2025, doi 10.36922/aih.3509.
"""

from pathlib import Path

__version__ = "0.1.0"


def conf_dir() -> Path:
    """The configuration folder: kdsweep/conf in an installed wheel, conf/ beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"
