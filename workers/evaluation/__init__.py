"""Evaluation of a bundle: a grid of preferences x methods, scored on held-out prompts with the serving engine."""

from workers.evaluation.config import EvaluateConfig, EvaluationError
from workers.evaluation.evaluate import EvaluationResult, Progress, evaluate
from workers.evaluation.planning import Plan, plan
from workers.evaluation.reading import load_evaluation

__all__ = [
    "EvaluateConfig",
    "EvaluationError",
    "EvaluationResult",
    "Plan",
    "Progress",
    "evaluate",
    "load_evaluation",
    "plan",
]
