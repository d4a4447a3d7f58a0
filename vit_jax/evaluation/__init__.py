"""Frozen features and the protocols that score them."""

from vit_jax.evaluation.baselines import BASELINES
from vit_jax.evaluation.errors import EvaluationError, Incomplete, UnlabelledError
from vit_jax.evaluation.features import Extracted, extract, extract_all, make_feature_fn
from vit_jax.evaluation.knn import knn
from vit_jax.evaluation.linear import linear_probe
from vit_jax.evaluation.model import check_image_size, evaluate_model
from vit_jax.evaluation.protocols import TASKS, check_tasks, evaluate
from vit_jax.evaluation.splits import Splits, open_splits

__all__ = [
  "BASELINES",
  "TASKS",
  "EvaluationError",
  "Extracted",
  "Incomplete",
  "Splits",
  "UnlabelledError",
  "check_image_size",
  "check_tasks",
  "evaluate",
  "evaluate_model",
  "extract",
  "extract_all",
  "knn",
  "linear_probe",
  "make_feature_fn",
  "open_splits",
]
