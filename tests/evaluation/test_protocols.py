"""`evaluate`: tasks by name, baselines on the same images, errors a user can act on."""

from __future__ import annotations

import numpy as np
import pytest

from tests.evaluation.batches import Means, batches, coloured
from vit_jax.evaluation import BASELINES, TASKS, UnlabelledError, evaluate, make_feature_fn

TRAIN, TEST = coloured(120, seed=0), coloured(50, seed=1)


@pytest.fixture(scope="module")
def feature_fn():
  return make_feature_fn(Means(), {"factor": np.float32(1.0)}, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def run(feature_fn, *, train=TRAIN, test=TEST, batch_size=32, tasks=("knn",), num_classes=4, **options):
  arguments = (feature_fn, batches(*train, batch_size), batches(*test, batch_size))
  return evaluate(*arguments, tasks=tasks, num_classes=num_classes, **options)


def test_colours_that_are_the_class_are_classified(feature_fn):
  scores = run(feature_fn, tasks=("knn", "linear"))
  assert scores["knn/top1"] == 1.0
  assert scores["linear/top1"] > 0.9
  assert set(scores) == {
    *(f"knn/{name}" for name in ("top1", "k10/top1", "k20/top1", "k100/top1", "k120/top1")),
    *(f"linear/{name}" for name in ("top1", "validation_top1", "lr")),
  }
  assert all(type(value) is float for value in scores.values())


def test_batch_size_changes_nothing(feature_fn):
  assert run(feature_fn, batch_size=7) == run(feature_fn, batch_size=64)


def test_baselines_are_scored_on_the_same_images_by_the_same_tasks(feature_fn):
  scores = run(feature_fn, baselines=dict(BASELINES) | {"itself": feature_fn})
  assert scores["baseline/itself/knn/top1"] == scores["knn/top1"]
  assert scores["baseline/histogram/knn/top1"] == 1.0  # the class is the colour
  assert scores["baseline/majority/knn/top1"] == np.mean(TEST[1] == np.bincount(TRAIN[1]).argmax())
  assert {key.split("/")[1] for key in scores if key.startswith("baseline/")} == {
    "pixels", "histogram", "itself", "majority"
  }  # fmt: skip
  assert not any(key.startswith("baseline/") for key in run(feature_fn))


def test_progress_counts_both_sources(feature_fn):
  counts = []
  run(feature_fn, progress=counts.append)
  assert counts == sorted(counts) and counts[-1] == 170


def test_unknown_task_lists_the_valid_ones(feature_fn):
  with pytest.raises(ValueError, match=r"no task 'linaer'; valid: knn, linear. Did you mean 'linear'\?"):
    run(feature_fn, tasks=("knn", "linaer"))


@pytest.mark.parametrize("tasks", ["knn", ()])
def test_tasks_must_be_a_tuple_of_names(feature_fn, tasks):
  with pytest.raises(ValueError, match="tuple of task names"):
    run(feature_fn, tasks=tasks)


def test_unlabelled_image_is_named_before_features_are_computed():
  images, labels = TRAIN
  labels = np.where(np.arange(120) == 40, -1, labels).astype(np.int32)

  def count(batch_images):
    calls.append(len(batch_images))
    return {"cls": np.zeros((len(batch_images), 2), np.float32)}

  calls = []
  with pytest.raises(UnlabelledError, match="Image 40 of folder:/photos has no label.*evaluation.train_source"):
    run(count, train=(images, labels), names=("folder:/photos", "the rest"))
  assert len(calls) == 1  # the batch before that image


def test_unlabelled_test_source_is_named(feature_fn):
  with pytest.raises(UnlabelledError, match="of the test source has no label"):
    run(feature_fn, test=(TEST[0], np.full(50, -1, np.int32)))


def test_a_source_without_classes_is_refused(feature_fn):
  with pytest.raises(UnlabelledError, match="needs at least 2"):
    run(feature_fn, num_classes=0)


def test_one_class_says_nothing(feature_fn):
  with pytest.raises(UnlabelledError, match="one label"):
    run(feature_fn, train=(TRAIN[0], np.full(120, 2, np.int32)))


def test_padding_may_be_unlabelled(feature_fn):
  padded = list(batches(*TRAIN, 50))
  padded[-1]["label"] = np.where(padded[-1]["valid"], padded[-1]["label"], -1).astype(np.int32)
  scores = evaluate(feature_fn, padded, batches(*TEST, 50), tasks=("knn",), num_classes=4)
  assert scores == run(feature_fn, batch_size=50)


def test_classes_must_agree(feature_fn):
  with pytest.raises(ValueError, match="share their classes"):
    run(feature_fn, test=(TEST[0], TEST[1] + 3))


def test_schema_default_is_a_known_task():
  from vit_jax.config import default

  assert set(default().evaluation.tasks) <= set(TASKS)
