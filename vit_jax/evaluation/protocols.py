"""The tasks by name, and `evaluate`: every task on the features of a model and of the baselines, same images."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vit_jax.evaluation.baselines import majority
from vit_jax.evaluation.errors import EvaluationError, Incomplete, UnlabelledError, listed
from vit_jax.evaluation.features import Extracted, FeatureFn, Progress, extract_all
from vit_jax.evaluation.knn import knn
from vit_jax.evaluation.linear import linear_probe

log = logging.getLogger(__name__)

_MODEL = "model"


def _knn(train: Extracted, test: Extracted, num_classes: int, seed: int) -> dict[str, float]:
  for part in (train, test):
    part.check_finite(patch_mean=False)
  return knn(train.cls, train.labels, test.cls, test.labels)


def _linear(train: Extracted, test: Extracted, num_classes: int, seed: int) -> dict[str, float]:
  for part in (train, test):
    part.check_finite()
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
  shared_classes: Mapping[int, str] | None = None,
  baselines: Mapping[str, FeatureFn] | None = None,
  names: tuple[str, str] = ("the training source", "the test source"),
  seed: int = 0,
  progress: Progress | None = None,
) -> dict[str, float]:
  """Scores frozen features.

  Args:
    feature_fn: what is scored; see `features.make_feature_fn`.
    train_batches: images that vote or train the probe; see `features.extract_all`.
    test_batches: images that are classified.
    tasks: of `TASKS`.
    num_classes: labels are in [0, num_classes).
    shared_classes: number -> name of classes that both sources list; those of which an image was read from one source
      and none from the other are logged.
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
    UnlabelledError: if no image has a label, or there is one class only. Images without a label are left out.
    EvaluationError: for an unknown task, no image, or labels >= num_classes.
    Incomplete: after all tasks, if some cannot be scored on these features (not finite, too few images of a class, out
      of memory); it has the scores of the others, and why these have none.
  """
  check_tasks(tasks)
  feature_fns = {_MODEL: feature_fn} | dict(baselines or {})
  train = extract_all(feature_fns, _labelled(train_batches, num_classes, names[0]), progress=progress)
  done = len(train[_MODEL].labels)
  if len(np.unique(train[_MODEL].labels)) < 2:
    raise UnlabelledError(f"All {done} images of {names[0]} that were read have one label: a score would say nothing")
  further = None if progress is None else lambda count: progress(done + count)
  test = extract_all(feature_fns, _labelled(test_batches, num_classes, names[1]), progress=further)
  _report_classes(shared_classes or {}, train[_MODEL].labels, test[_MODEL].labels, names)
  results, failed = {}, {}
  for name in feature_fns:
    prefix = "" if name == _MODEL else f"baseline/{name}/"
    for task in tasks:
      try:
        scores = _scored(task, train[name], test[name], num_classes, seed)
      except EvaluationError as error:  # the other tasks are none the worse
        failed[f"{prefix}{task}"] = str(error)
      else:
        results |= {f"{prefix}{task}/{metric}": value for metric, value in scores.items()}
  if baselines:
    know_nothing = majority(train[_MODEL].labels, test[_MODEL].labels)
    results |= {f"baseline/majority/{task}/top1": know_nothing for task in tasks if task not in failed}
  if failed:
    raise Incomplete(results, failed)
  return results


def _scored(task: str, train: Extracted, test: Extracted, num_classes: int, seed: int) -> dict[str, float]:
  try:
    return TASKS[task](train, test, num_classes, seed)
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
      raise EvaluationError(
        f"out of memory with {len(train.labels)} and {len(test.labels)} images: use fewer (max_examples)."
      ) from error
    raise


def _report_classes(shared: Mapping[int, str], train: np.ndarray, test: np.ndarray, names: tuple[str, str]) -> None:
  """Names the classes of which one source has images and the other none: what a list of classes does not tell."""
  seen, asked = ({*np.unique(labels).tolist()} for labels in (train, test))
  for level, there, missing, where, says in (
    (logging.WARNING, asked, seen, names[0], "no answer to their images can be right"),
    (logging.INFO, seen, asked, names[1], "they are not scored"),
  ):
    if absent := [name for number, name in shared.items() if number in there - missing]:
      log.log(level, "evaluation: of the images of %s that were read, none is of: %s; %s.", where, listed(absent), says)


def check_tasks(tasks: Sequence[str], key: str = "evaluation.tasks") -> None:
  """Raises EvaluationError unless `tasks` is a non-empty sequence of names of `TASKS`, which the user calls `key`."""
  if isinstance(tasks, str) or not tasks:
    raise EvaluationError(f'{key} must be a tuple of task names such as ("knn",), got {tasks!r}.')
  for task in tasks:
    if task not in TASKS:
      near = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.4)
      hint = f" Did you mean {near[0]!r}?" if near else ""
      raise EvaluationError(f"{key}: there is no task {task!r}; valid: {', '.join(TASKS)}.{hint}")


def _labelled(batches: Iterable[Mapping[str, Any]], num_classes: int, name: str) -> Iterator[Mapping[str, Any]]:
  """The batches with those images as padding that have no label, which are counted; each checked before it is used."""
  if num_classes < 2:
    raise UnlabelledError(f"{name} has labels of {num_classes} class(es), and scoring needs at least 2")
  count, unlabelled, first = 0, 0, -1
  for batch in batches:
    valid, known = np.asarray(batch["valid"], bool), np.asarray(batch["label"]) >= 0
    labels = np.asarray(batch["label"])[valid]
    if (labels < 0).any():
      first = first if unlabelled else count + int(np.argmax(labels < 0))
      unlabelled += int((labels < 0).sum())
    if (labels >= num_classes).any():
      raise EvaluationError(
        f"Image {count + int(np.argmax(labels >= num_classes))} of {name} has label {labels.max()}, but there are "
        f"{num_classes} classes: training and test source must share their classes."
      )
    count += len(labels)
    yield {**batch, "valid": valid & known}
  if unlabelled:
    if unlabelled == count:
      raise UnlabelledError(f"None of the {count:,} images of {name} that were read has a label")
    log.warning("evaluation: %s: %d of %d images read have no label and are not used, the first of them image %d.",
                name, unlabelled, count, first)  # fmt: skip
