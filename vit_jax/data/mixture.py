"""`0.7 folder:/a + 0.3 tar:/b/*.tar`: several sources with weights.

The weights need not sum to one. Of every so many images (ten, for these weights) exactly the stated share is from each
source; each source has epochs of its own, in which each of its records comes once, whenever they end (`order.py`).
Classes of the same name in different sources are the same class.
"""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from vit_jax.data.classes import ordered
from vit_jax.data.left_out import LeftOut, left_out_of
from vit_jax.data.limits import DEFAULT, Limits, limits_of
from vit_jax.data.sources import Source, open_source

_PART = re.compile(r"\s*(?:(\d+(?:\.\d*)?|\.\d+)\s*\*?\s+)?([A-Za-z_]\w+:.*?)\s*", re.DOTALL)
_LONGEST = 10_000  # places of a period: shares are exact to a hundredth of a per cent


class MixtureSource:
  """The records of several sources one behind the other.

  Attributes:
    parts: the sources.
    shares: how many of the images of a period are from each.
  """

  def __init__(self, parts: Sequence[Source], shares: Sequence[int]):
    self.parts = list(parts)
    self.shares = list(shares)
    self._starts = np.cumsum([0] + [len(part) for part in parts]).tolist()
    self.class_names, self._classes = _joint_classes(self.parts)
    self.num_classes = len(self.class_names)
    self.left_out = LeftOut()
    for source in self.parts:
      self.left_out.merge(left_out_of(source))
    self.remote = any(getattr(part, "remote", False) for part in parts)
    self.limits = limits_of(self.parts[0])

  def __len__(self) -> int:
    return self._starts[-1]

  def __getitem__(self, index: int) -> dict[str, bytes | np.ndarray | int]:
    part, inside = self._place(index)
    entry = self.parts[part][inside]
    label = int(entry["label"])
    return {**entry, "label": self._classes[part][label] if label >= 0 else -1}

  def describe(self, index: int) -> str:
    part, inside = self._place(index)
    return self.parts[part].describe(inside)

  def _place(self, index: int) -> tuple[int, int]:
    if not 0 <= index < len(self):
      raise IndexError(index)
    part = bisect_right(self._starts, index) - 1
    return part, index - self._starts[part]


def is_mixture(spec: str) -> bool:
  """Whether a specification is one of several sources, or of one with a weight."""
  return len(_split(spec)) > 1 or re.match(r"\s*[\d.]+\s*\*?\s+\w+:", spec) is not None


def mixture_parts(spec: str) -> list[tuple[Fraction, str]]:
  """(weight, specification) of each source of a mixture; a weight that is not given is 1.

  Raises:
    ValueError: if one is malformed.
  """
  parts = []
  for text in _split(spec):
    found = _PART.fullmatch(text)
    if not found:
      raise ValueError(
        f"data.source = {spec!r}: {text.strip()!r} is not of the form WEIGHT scheme:rest, as in "
        "0.7 folder:/photos + 0.3 tar:/shards/*.tar."
      )
    weight = Fraction(found[1] or 1)
    if weight <= 0:
      raise ValueError(f"data.source = {spec!r}: the weight of {found[2]} must be more than 0.")
    parts.append((weight, found[2]))
  return parts


def open_mixture(
  spec: str, *, cache_dir: str | os.PathLike | None = None, limits: Limits = DEFAULT
) -> MixtureSource:
  """Opens all sources of a mixture.

  Raises:
    ValueError: if it or one of them is malformed or names nothing.
  """
  weights, specs = zip(*mixture_parts(spec), strict=True)
  shares = period_shares(weights)
  if 0 in shares:
    at = shares.index(0)
    raise ValueError(
      f"data.source = {spec!r}: the weight of {specs[at]} is less than 1 / {_LONGEST} of all; raise it or leave it out."
    )
  return MixtureSource([open_source(one, cache_dir=cache_dir, limits=limits) for one in specs], shares)


def period_shares(weights: Sequence[Fraction]) -> list[int]:
  """The smallest whole numbers in these proportions; with a sum of 10,000, rounded, where theirs would be larger."""
  total = sum(weights)
  exact = [weight / total for weight in weights]
  period = math.lcm(*(share.denominator for share in exact))
  if period <= _LONGEST:
    return [int(share * period) for share in exact]
  shares = [int(share * _LONGEST) for share in exact]
  by_rest = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i] * _LONGEST)
  for i in by_rest[: _LONGEST - sum(shares)]:
    shares[i] += 1
  return shares


def _split(spec: str) -> list[str]:
  """The texts between the plus signs that separate sources: those before a weight or a scheme."""
  return re.split(r"\s\+\s+(?=(?:[\d.]+\s*\*?\s+)?[A-Za-z_]\w+:)", spec)


def _joint_classes(parts: Sequence[Source]) -> tuple[tuple[str, ...], list[list[int]]]:
  """(class names, for each source: which class of the mixture each of its own is): the same name is the same class."""
  names = ordered(set().union(*(part.class_names for part in parts)))
  numbers = {name: i for i, name in enumerate(names)}
  return tuple(names), [[numbers[name] for name in part.class_names] for part in parts]
