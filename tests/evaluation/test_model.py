"""From a model and two specifications of images to scores beside the baselines."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from tests.evaluation.test_splits import folder
from vit_jax.evaluation import EvaluationError, evaluate_model
from vit_jax.models import create_model


@pytest.fixture(scope="module")
def vit():
  model = create_model("vit_small", patch_size=8, width=32, depth=2, num_heads=2, mlp_hidden=64, layer_scale=None)
  return model, jax.jit(model.init)(jax.random.key(1), np.zeros((1, 16, 16, 3), np.float32))["params"]


def test_a_small_model_on_200_images(vit, tmp_path):
  train = folder(tmp_path / "train", 160)
  folder(tmp_path / "test", 40, seed=1)
  options = dict(train_source=train, image_size=16)
  counts = []
  scores = evaluate_model(
    *vit, tasks=("knn",), **options, batch_size=32, progress=counts.append, output=tmp_path / "scores.json"
  )
  assert counts[-1] == 200
  # Colour is the class: untrained networks and histograms see it, pixels partly; a constant answer does not.
  assert min(scores["knn/top1"], scores["baseline/untrained/knn/top1"], scores["baseline/histogram/knn/top1"]) > 0.9
  assert scores["baseline/majority/knn/top1"] < 0.5 < scores["baseline/pixels/knn/top1"]
  saved = json.loads((tmp_path / "scores.json").read_text())
  assert saved["results"] == scores
  assert saved["about"]["train"] == f"{train} (160 images)"
  assert saved["about"]["test"] == f"folder:{tmp_path}/test (40 images)"

  alone = evaluate_model(*vit, tasks=("knn", "linear"), **options, batch_size=7, baselines=False)
  assert alone["knn/top1"] == pytest.approx(scores["knn/top1"], abs=0.03)  # one image of 40
  assert alone["linear/top1"] > 0.8
  assert not any("baseline" in key for key in alone)


def test_mistakes_are_found_before_any_source_is_opened(vit, tmp_path):
  options = dict(train_source="folder:/nowhere", image_size=16)
  with pytest.raises(EvaluationError, match="valid: knn, linear"):
    evaluate_model(*vit, tasks=("k-nn",), **options)
  with pytest.raises(EvaluationError, match="scores.txt"):
    evaluate_model(*vit, tasks=("knn",), output=tmp_path / "scores.txt", **options)
