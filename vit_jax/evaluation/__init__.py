"""Frozen features and the protocols that score them."""

from vit_jax.evaluation.baselines import BASELINES
from vit_jax.evaluation.errors import EvaluationError, UnlabelledError
from vit_jax.evaluation.features import Extracted, extract, extract_all, make_feature_fn
from vit_jax.evaluation.knn import knn
from vit_jax.evaluation.linear import linear_probe
from vit_jax.evaluation.protocols import TASKS, check_tasks, evaluate

__all__ = [
  "BASELINES",
  "TASKS",
  "EvaluationError",
  "Extracted",
  "UnlabelledError",
  "check_tasks",
  "evaluate",
  "extract",
  "extract_all",
  "knn",
  "linear_probe",
  "make_feature_fn",
]
