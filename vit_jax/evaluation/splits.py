"""Which labelled images train a classifier of features, and which test it."""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping

import numpy as np

from vit_jax.data.evaluation_batches import evaluation_batches
from vit_jax.data.limits import DEFAULT, Limits
from vit_jax.data.sources import Source, open_source, share_images, split_options, split_specs
from vit_jax.data.subsets import Relabelled, Subset, at_most, keep
from vit_jax.evaluation.errors import EvaluationError, UnlabelledError, listed

log = logging.getLogger(__name__)

# "validation" first: where a set has both, its test labels are often secret.
_TEST_SPLITS = ("validation", "val", "test")
_HELD_OUT = 0.1  # share of the images that are tested on where a source has no such split
_SEED = 0  # of the choice of those held out: the same images in every run and on every machine


@dataclasses.dataclass(frozen=True)
class Splits:
  """Two sources of labelled images with one numbering of their classes, and what to call them."""

  train: Source
  test: Source
  train_name: str
  test_name: str
  shared_classes: Mapping[int, str]  # number -> name, of the classes that both list

  @property
  def names(self) -> tuple[str, str]:
    return self.train_name, self.test_name

  @property
  def num_classes(self) -> int:
    return self.train.num_classes

  def about(self) -> dict[str, str]:
    """What was scored on what, for a report."""
    parts = zip(("train", "test"), self.names, (self.train, self.test), strict=True)
    return {key: f"{name} ({len(source)} images)" for key, name, source in parts}

  def keep(self) -> None:
    """Prepares both for many readings; see `data.subsets.keep`."""
    for part in (self.train, self.test):
      keep(part)

  def batches(
    self,
    *,
    image_size: int,
    batch_size: int,
    channels: int = 3,
    value_range: tuple[float, float] | None = None,
    crop_ratio: float | None = None,
  ) -> tuple[Iterator[dict], Iterator[dict]]:
    """Batches of all images of train and of test, for `evaluate`; see `evaluation_batches`."""
    options = dict(image_size=image_size, batch_size=batch_size, channels=channels)
    options |= dict(value_range=value_range, crop_ratio=crop_ratio)
    return tuple(evaluation_batches(part, **options, max_examples=len(part)) for part in (self.train, self.test))


def open_splits(
  train_source: str,
  test_source: str | None = None,
  *,
  max_examples: int | None = None,
  cache_dir: str | os.PathLike | None = None,
  limits: Limits = DEFAULT,
) -> Splits:
  """Opens the images to train and to test on.

  Args:
    train_source: specification of a labelled source (see `vit_jax.data.sources`).
    test_source: specification of the source to test on. None: the validation or test split of `train_source` if it
      names a training split of data that has one, else a tenth of its images, drawn at random, the same ones always,
      which are then not trained on. `test_name` of the result says which.
    max_examples: images of each of the two that are used at most, drawn at random, the same ones always. None: all.
    cache_dir: see `data.cache_dir`.
    limits: bounds on the bytes and pixels of each image (`data.max_file_bytes`, `data.max_pixels`).

  Raises:
    UnlabelledError: if there are fewer than two classes.
    EvaluationError: if the sources share images or have no class in common, or there are too few images to hold any
      out.
  """
  if test_source is not None and share_images(train_source, test_source):
    raise EvaluationError(
      f"{test_source} holds images of {train_source}, which are learned from: each would be its own nearest neighbour. "
      "Name other images as --test_data (test_source), or none: a test split or held-out images are then used."
    )
  train = open_source(train_source, cache_dir=cache_dir, limits=limits)
  if train.num_classes < 2:
    raise UnlabelledError(f"{train_source} has labels of {train.num_classes} class(es), and scoring needs at least 2")
  name = train_source
  test_source = test_source or _test_split(train_source)
  if test_source is not None:
    test = open_source(test_source, cache_dir=cache_dir, limits=limits)
    train, test, shared = _with_classes_of(train, test, (train_source, test_source))
  else:
    shared = dict(enumerate(names_of(train)))
    train, test = _hold_out(train, name)
    name = f"{train_source} without the held-out images"
    test_source = f"{len(test)} held-out images of {train_source}"
  log.info("evaluation: features are trained on %s and tested on %s", name, test_source)
  return Splits(at_most(train, max_examples), at_most(test, max_examples), name, test_source, shared)


def _test_split(spec: str) -> str | None:
  """The split to test on that belongs to the training split `spec`, if there is one."""
  own = split_options(spec)[0].rstrip("/").rpartition("/")[2]
  if own.startswith(_TEST_SPLITS):
    return None  # the images to train on are themselves of a test split
  beside = split_specs(spec)
  return next((beside[name] for name in _TEST_SPLITS if name in beside), None)


def _hold_out(source: Source, name: str) -> tuple[Subset, Subset]:
  if len(source) < 2:
    raise EvaluationError(f"{name} has {len(source)} images, too few to test on some of them: set test_source.")
  order = np.random.default_rng(_SEED).permutation(len(source))
  num = max(1, round(_HELD_OUT * len(source)))
  return Subset(source, np.sort(order[num:])), Subset(source, np.sort(order[:num]))


def names_of(source: Source) -> list[str]:
  """One name per label; where a class has none, its number."""
  return [*source.class_names, *map(str, range(len(source.class_names), source.num_classes))]


def _with_classes_of(train: Source, test: Source, names: tuple[str, str]) -> tuple[Source, Source, dict[int, str]]:
  """Both sources with labels of one list, and which classes of it both have.

  The list is of the classes of `train`, as it numbers them, then of those of `test` alone. Classes are the same if
  their names are: a source lists the classes that it has, so that the numbers of a validation set that lacks a class
  are not those of its training set.
  """
  ours, theirs = _numbered(names_of(train)), _numbered(names_of(test))
  shared = {number: _shown(name) for name, number in ours.items() if name in theirs}
  if ours == theirs:
    return train, test, shared
  if not theirs:
    raise UnlabelledError(f"{names[1]} has no labels")
  further = [name for name in theirs if name not in ours]
  if len(further) == len(theirs):
    raise EvaluationError(
      f"{names[0]} and {names[1]} have no class in common (of the first: {listed(map(_shown, ours))}; of the second: "
      f"{listed(map(_shown, theirs))}): every answer would be wrong. Classes are compared by name; give a test source "
      "whose folders, or labels, are called as those of the training source."
    )
  if missing := [name for name in ours if name not in theirs]:
    log.warning("evaluation: %s has no images of: %s. It is scored on its other %d classes.",
                names[1], listed(map(_shown, missing)), len(theirs) - len(further))  # fmt: skip
  if further:
    log.warning("evaluation: %s has classes that %s does not have: %s. Their images count, and no answer to them can "
                "be right.", names[1], names[0], listed(map(_shown, further)))  # fmt: skip
  joint = ours | {name: len(ours) + i for i, name in enumerate(further)}
  joint_names = tuple(map(_shown, joint))
  return (
    Relabelled(train, range(len(ours)), joint_names),
    Relabelled(test, [joint[name] for name in theirs], joint_names),
    shared,
  )


def _numbered(names: list[str]) -> dict[tuple[str, int], int]:
  """(name, how often it came before) -> number: classes of one name stay apart (ImageNet has two cranes)."""
  seen: collections.Counter[str] = collections.Counter()
  numbers = {}
  for number, name in enumerate(names):
    numbers[name, seen[name]] = number
    seen[name] += 1
  return numbers


def _shown(name: tuple[str, int]) -> str:
  return name[0]
