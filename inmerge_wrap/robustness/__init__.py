"""Robustness evaluation: corruptions, attacks, calibration, and confidence intervals.

    result = evaluate_robustness(model, loader, preset="dermatoscopy", mean=0.5, std=0.5)
    result.value("balanced_error", "motion_blur", severity=3)

`evaluation` runs a model over images, `corruptions` and `attacks` perturb them, `metrics` scores
the outputs, `results` holds the rows and compares two models.
"""

from inmerge_wrap.robustness.attacks import Attack
from inmerge_wrap.robustness.evaluation import evaluate_robustness
from inmerge_wrap.robustness.metrics import (
    bootstrap_weights,
    classification_metrics,
    paired_difference,
    percentile_interval,
)
from inmerge_wrap.robustness.results import RobustnessResult, compare_results

__all__ = [
    "Attack",
    "RobustnessResult",
    "bootstrap_weights",
    "classification_metrics",
    "compare_results",
    "evaluate_robustness",
    "paired_difference",
    "percentile_interval",
]
