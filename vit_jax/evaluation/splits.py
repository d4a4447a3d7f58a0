"""Which labelled images train a classifier of features, and which test it."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vit_jax.data.evaluation_batches import evaluation_batches
from vit_jax.data.limits import DEFAULT, Limits, limits_of
from vit_jax.data.sources import Source, open_source, share_images, split_options, split_specs
from vit_jax.evaluation.errors import EvaluationError, UnlabelledError

log = logging.getLogger(__name__)

# "validation" first: where a set has both, its test labels are often secret.
_TEST_SPLITS = ("validation", "val", "test")
_HELD_OUT = 0.1  # share of the images that are tested on where a source has no such split
_SEED = 0  # of every choice of images here: the same images in every run and on every machine


@dataclasses.dataclass(frozen=True)
class Splits:
  """Two sources of labelled images of the same classes, and what to call them."""

  train: Source
  test: Source
  train_name: str
  test_name: str

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


class Subset:
  """Some of the images of a source, as a source."""

  def __init__(self, source: Source, indices: Sequence[int]):
    self._source = source
    self._indices = np.asarray(indices)
    self.num_classes = source.num_classes
    self.class_names = source.class_names
    self.limits = limits_of(source)

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._source[int(self._indices[index])]

  def describe(self, index: int) -> str:
    return self._source.describe(int(self._indices[index]))


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
    EvaluationError: if the sources share images or do not have the same classes, or there are too few images to hold
      any out.
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
    _check_classes(train, test, train_source, test_source)
  else:
    train, test = _hold_out(train, name)
    name = f"{train_source} without the held-out images"
    test_source = f"{len(test)} held-out images of {train_source}"
  log.info("evaluation: features are trained on %s and tested on %s", name, test_source)
  return Splits(_at_most(max_examples, train), _at_most(max_examples, test), name, test_source)


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


def _at_most(num: int | None, source: Source) -> Source:
  """The source, or as many of its images drawn at random: the first ones would be of few classes where it is sorted."""
  if num is None or len(source) <= num:
    return source
  return Subset(source, np.sort(np.random.default_rng(_SEED).permutation(len(source))[:num]))


def _check_classes(train: Source, test: Source, train_source: str, test_source: str) -> None:
  if tuple(train.class_names) == tuple(test.class_names) and train.num_classes == test.num_classes:
    return
  only_train = sorted(set(train.class_names) - set(test.class_names))
  only_test = sorted(set(test.class_names) - set(train.class_names))
  raise EvaluationError(
    f"{train_source} and {test_source} do not have the same classes ({train.num_classes} and {test.num_classes}"
    + (f"; only the first has {', '.join(only_train[:5])}" if only_train else "")
    + (f"; only the second has {', '.join(only_test[:5])}" if only_test else "")
    + "): a label would not mean the same in both. Give a test source with the classes of the training source."
  )
