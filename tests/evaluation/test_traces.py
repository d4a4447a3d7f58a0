"""Programs of an evaluation are traced once: a second trace of one would compile it again at every evaluation."""

from __future__ import annotations

import importlib

import chex
import jax
import numpy as np
import pytest

from tests.evaluation.batches import Means, batches, coloured
from vit_jax.evaluation import evaluate, make_feature_fn

# What is compiled, with its static arguments, and how many shapes an evaluation of TRAIN and TEST has of it: heads are
# compared on whole chunks and on the rest of the validation images, and the chosen one on the test images.
PROGRAMS = [
  ("features", "_apply", dict(static_argnums=(0, 1, 2, 3)), 1),
  ("knn", "_merge", {}, 1),
  ("knn", "_vote", dict(static_argnums=(2, 3)), 1),
  ("linear", "_fit", {}, 1),
  ("linear", "_compare", {}, 2),
]
TRAIN, TEST = coloured(120, seed=0), coloured(50, seed=1)


@pytest.fixture
def traced(monkeypatch):
  """The programs of an evaluation as they are, but none may be traced for more shapes than it has."""
  chex.clear_trace_counter()
  for file, name, options, shapes in PROGRAMS:
    module = importlib.import_module(f"vit_jax.evaluation.{file}")
    counted = chex.assert_max_traces(getattr(module, name).__wrapped__, n=shapes)
    monkeypatch.setattr(module, name, jax.jit(counted, **options))
  yield
  chex.clear_trace_counter()


def scores(factor, batch_size=32):
  feature_fn = make_feature_fn(
    Means(), {"factor": np.float32(factor)}, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
  )
  return evaluate(
    feature_fn, batches(*TRAIN, batch_size), batches(*TEST, batch_size), tasks=("knn", "linear"), num_classes=4
  )


def test_the_next_evaluation_traces_nothing(traced):
  assert scores(1.0)["knn/top1"] == 1.0
  scores(2.0)  # other parameters of the same model


def test_another_shape_is_another_trace_and_is_seen(traced):
  scores(1.0)
  with pytest.raises(AssertionError, match=r"'_apply' is traced > 1 times"):
    scores(1.0, batch_size=25)
