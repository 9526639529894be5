"""What a model is worth: metrics, their spread over seeds, plots and reports."""

from hubtransfer.evaluation.confidence import Interval, mean_interval
from hubtransfer.evaluation.metrics import Evaluation, evaluate_outputs, evaluates, first_metric

__all__ = ["Evaluation", "Interval", "evaluate_outputs", "evaluates", "first_metric", "mean_interval"]
