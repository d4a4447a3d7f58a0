"""Sources made of a source: some of its records, its records with other labels; and one that is read many times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax.data.limits import limits_of

if TYPE_CHECKING:
  from vit_jax.data.sources import Source

_SEED = 0  # decides which images stand for a source that is larger than asked for: the same ones everywhere, always


class Subset:
  """Some of the records of a source, as a source."""

  def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
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

  def take(self, indices: np.ndarray) -> Source:
    return take(self._source, self._indices[indices])

  def keep(self) -> None:
    if 2 * len(self) >= len(self._source):  # to make all for a few would be a waste
      keep(self._source)


class Relabelled:
  """A source with the numbers of other classes: label i becomes `numbers[i]`; no label (-1) stays none."""

  def __init__(self, source: Source, numbers: Sequence[int], class_names: tuple[str, ...]):
    self._source = source
    self._numbers = tuple(numbers)
    self.class_names = class_names
    self.num_classes = len(class_names)
    self.limits = limits_of(source)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    entry = self._source[index]
    label = int(entry["label"])
    if label >= len(self._numbers):
      label = self.num_classes  # no class: whoever reads it says so
    elif label >= 0:
      label = self._numbers[label]
    return {**entry, "label": label}

  def describe(self, index: int) -> str:
    return self._source.describe(index)

  def take(self, indices: np.ndarray) -> Source:
    return Relabelled(take(self._source, indices), self._numbers, self.class_names)

  def keep(self) -> None:
    keep(self._source)


def take(source: Source, indices: np.ndarray) -> Source:
  """These records as a source; of one that makes its records, the others are then not made."""
  if not hasattr(source, "take"):
    return Subset(source, indices)
  taken = source.take(indices)
  taken.limits = limits_of(source)
  return taken


def at_most(source: Source, num: int | None) -> Source:
  """The source, or a fixed random choice of `num` of its records, in their order; None: all.

  Random, because the first ones of a source sorted by class would be of few classes.
  """
  if num is None or len(source) <= num:
    return source
  return take(source, np.sort(np.random.default_rng(_SEED).permutation(len(source))[:num]))


def keep(source: Source) -> None:
  """Prepares for many readings: embedded sets make all their images now and keep them. Other sources have theirs."""
  for part in getattr(source, "parts", (source,)):
    if hasattr(part, "keep"):
      part.keep()
