"""The tasks by name, and `evaluate`: every task on the features of a model and of the baselines, same images."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.evaluation.baselines import majority
from vit_jax.evaluation.errors import EvaluationError, UnlabelledError
from vit_jax.evaluation.features import Extracted, FeatureFn, Progress, extract_all
from vit_jax.evaluation.knn import knn
from vit_jax.evaluation.linear import linear_probe

_MODEL = "model"


def _knn(train: Extracted, test: Extracted, num_classes: int, seed: int) -> dict[str, float]:
  return knn(train.cls, train.labels, test.cls, test.labels)


def _linear(train: Extracted, test: Extracted, num_classes: int, seed: int) -> dict[str, float]:
  return linear_probe(
    train.cls_and_patch_mean,
    train.labels,
    test.cls_and_patch_mean,
    test.labels,
    num_classes=num_classes,
    seed=seed,
  )


# (train, test, num_classes, seed) -> metrics; a metric "m" of task "t" is reported as "t/m".
TASKS: Mapping[str, Callable[[Extracted, Extracted, int, int], dict[str, float]]] = {"knn": _knn, "linear": _linear}


def evaluate(
  feature_fn: FeatureFn,
  train_batches: Iterable[Mapping[str, Any]],
  test_batches: Iterable[Mapping[str, Any]],
  *,
  tasks: Sequence[str],
  num_classes: int,
  baselines: Mapping[str, FeatureFn] | None = None,
  names: tuple[str, str] = ("the training source", "the test source"),
  seed: int = 0,
  progress: Progress | None = None,
) -> dict[str, float]:
  """Scores frozen features.

  Args:
    feature_fn: what is scored; see `features.make_feature_fn`.
    train_batches: labelled images that vote or train the probe; see `features.extract_all`.
    test_batches: labelled images that are classified.
    tasks: of `TASKS`.
    num_classes: labels are in [0, num_classes).
    baselines: name -> feature function that is scored in the same way on the same images (`baselines.BASELINES`;
      features of the untrained network).
    names: what to call the two sources in errors.
    seed: of the linear probe.
    progress: called after every batch with the images done so far, of both sources together.

  Returns:
    "<task>/<metric>" for the model, "baseline/<name>/<task>/<metric>" for each baseline, and, if there are baselines,
    "baseline/majority/<task>/top1", the score of always answering the most frequent class. Accuracies are in [0, 1];
    "knn/top1" is that of k = 10, "linear/top1" that of the head with the best validation accuracy.

  Raises:
    UnlabelledError: if an image has no label, or there is one class only.
    EvaluationError: for an unknown task, no image, features that are not finite, or labels >= num_classes.
  """
  check_tasks(tasks)
  feature_fns = {_MODEL: feature_fn} | dict(baselines or {})
  train = extract_all(feature_fns, _labelled(train_batches, num_classes, names[0]), progress=progress)
  done = len(train[_MODEL].labels)
  if len(np.unique(train[_MODEL].labels)) < 2:
    raise UnlabelledError(f"All {done} images of {names[0]} that were read have one label: a score would say nothing")
  further = None if progress is None else lambda count: progress(done + count)
  test = extract_all(feature_fns, _labelled(test_batches, num_classes, names[1]), progress=further)
  results = {}
  for name in feature_fns:
    prefix = "" if name == _MODEL else f"baseline/{name}/"
    for task in tasks:
      scores = TASKS[task](train[name], test[name], num_classes, seed)
      results |= {f"{prefix}{task}/{metric}": value for metric, value in scores.items()}
  if baselines:
    know_nothing = majority(train[_MODEL].labels, test[_MODEL].labels)
    results |= {f"baseline/majority/{task}/top1": know_nothing for task in tasks}
  return results


def check_tasks(tasks: Sequence[str]) -> None:
  """Raises EvaluationError unless `tasks` is a non-empty sequence of names of `TASKS`."""
  if isinstance(tasks, str) or not tasks:
    raise EvaluationError(f'evaluation.tasks must be a tuple of task names such as ("knn",), got {tasks!r}.')
  for task in tasks:
    if task not in TASKS:
      near = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.4)
      hint = f" Did you mean {near[0]!r}?" if near else ""
      raise EvaluationError(f"evaluation.tasks: there is no task {task!r}; valid: {', '.join(TASKS)}.{hint}")


def _labelled(batches: Iterable[Mapping[str, Any]], num_classes: int, name: str) -> Iterator[Mapping[str, Any]]:
  """The batches, each checked before anything is computed of it, so that unlabelled data fails at once."""
  if num_classes < 2:
    raise UnlabelledError(f"{name} has {num_classes or 'no'} classes, and scoring needs at least 2")
  count = 0
  for batch in batches:
    labels = np.asarray(batch["label"])[np.asarray(batch["valid"], bool)]
    if (labels < 0).any():
      raise UnlabelledError(f"Image {count + int(np.argmax(labels < 0))} of {name} has no label")
    if (labels >= num_classes).any():
      raise EvaluationError(
        f"Image {count + int(np.argmax(labels >= num_classes))} of {name} has label {labels.max()}, but there are "
        f"{num_classes} classes: training and test source must share their classes."
      )
    count += len(labels)
    yield batch
