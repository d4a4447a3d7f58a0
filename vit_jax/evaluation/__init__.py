"""Frozen features and the protocols that score them."""

from vit_jax.evaluation.baselines import BASELINES
from vit_jax.evaluation.features import Extracted, extract, extract_all, make_feature_fn
from vit_jax.evaluation.knn import knn
from vit_jax.evaluation.linear import linear_probe
from vit_jax.evaluation.protocols import TASKS, UnlabelledError, check_tasks, evaluate

__all__ = [
  "BASELINES",
  "TASKS",
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
