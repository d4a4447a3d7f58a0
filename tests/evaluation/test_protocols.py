"""`evaluate`: tasks by name, baselines on the same images, errors a user can act on."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.evaluation.batches import Means, batches, coloured
from vit_jax.evaluation import BASELINES, TASKS, Incomplete, UnlabelledError, check_tasks, evaluate, make_feature_fn

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


def test_tasks_are_called_what_the_user_calls_them():
  with pytest.raises(ValueError, match="--tasks: there is no task 'foo'; valid: knn, linear."):
    check_tasks(("foo",), "--tasks")


@pytest.mark.parametrize("tasks", ["knn", ()])
def test_tasks_must_be_a_tuple_of_names(feature_fn, tasks):
  with pytest.raises(ValueError, match="tuple of task names"):
    run(feature_fn, tasks=tasks)


def test_images_without_a_label_are_counted_and_change_no_score(feature_fn, caplog):
  images, labels = TRAIN
  stray = np.array([0, 40, 119])
  expected = run(feature_fn)
  found = run(
    feature_fn,
    train=(np.insert(images, stray, images[:1], axis=0), np.insert(labels, stray, -1)),
    names=("folder:/photos", "the rest"),
  )
  assert found == expected
  assert "folder:/photos: 3 of 123 images read have no label and are not used, the first of them image 0" in caplog.text


def test_a_test_source_without_any_label_is_named(feature_fn):
  with pytest.raises(UnlabelledError, match="None of the 50 images of the test source .* has a label"):
    run(feature_fn, test=(TEST[0], np.full(50, -1, np.int32)))


def test_a_source_without_classes_is_refused(feature_fn):
  with pytest.raises(UnlabelledError, match="needs at least 2"):
    run(feature_fn, num_classes=0)


def test_one_class_says_nothing(feature_fn):
  with pytest.raises(UnlabelledError, match="one label"):
    run(feature_fn, train=(TRAIN[0], np.full(120, 2, np.int32)))


def test_a_task_that_fails_keeps_the_scores_of_the_others(feature_fn):
  """The probe needs a second image of some class to choose its learning rate on; the neighbours do not."""
  one_each = TRAIN[0][:4], np.arange(4, dtype=np.int32)
  with pytest.raises(Incomplete, match="not scored: linear, baseline/pixels/linear: .*one image only") as caught:
    run(feature_fn, train=one_each, tasks=("linear", "knn"), baselines={"pixels": BASELINES["pixels"]})
  assert caught.value.results == run(
    feature_fn, train=one_each, tasks=("knn",), baselines={"pixels": BASELINES["pixels"]}
  )
  assert set(caught.value.failed) == {"linear", "baseline/pixels/linear"}


def test_patch_features_that_are_not_finite_are_no_matter_to_the_class_token(feature_fn):
  def broken(images):
    return feature_fn(images) | {"patch_mean": np.full((len(images), 3), np.nan, np.float32)}

  with pytest.raises(Incomplete, match="scored: linear: 120 of 120 images have NaN .*features/patch_mean") as caught:
    run(broken, tasks=("knn", "linear"))
  assert caught.value.results["knn/top1"] == 1.0


def test_running_out_of_memory_fails_one_task(feature_fn, monkeypatch):
  def hungry(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

  monkeypatch.setattr("vit_jax.evaluation.protocols.TASKS", {**TASKS, "linear": hungry})
  with pytest.raises(Incomplete, match="linear: out of memory with 120 and 50 images.*max_examples") as caught:
    run(feature_fn, tasks=("linear", "knn"))
  assert caught.value.results["knn/top1"] == 1.0


def test_a_programming_error_is_no_failed_task(feature_fn, monkeypatch):
  monkeypatch.setattr("vit_jax.evaluation.protocols.TASKS", {**TASKS, "linear": lambda *_: 1 / 0})
  with pytest.raises(ZeroDivisionError):
    run(feature_fn, tasks=("knn", "linear"))


def test_classes_without_images_are_named(feature_fn, caplog):
  shared = {0: "red", 1: "green", 2: "blue", 3: "grey"}
  test = tuple(array[TEST[1] < 2] for array in TEST)
  train = tuple(array[TRAIN[1] > 0] for array in TRAIN)
  with caplog.at_level("INFO", "vit_jax"):
    run(feature_fn, train=train, test=test, shared_classes=shared, names=("folder:/a", "folder:/b"))
  assert "images of folder:/a that were read, none is of: red; no answer to their images can be right" in caplog.text
  assert "images of folder:/b that were read, none is of: blue, grey; they are not scored" in caplog.text


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
