"""Names of scores, for people."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_K = re.compile(r"k(\d+)/top1")


def headline(scores: Mapping[str, float]) -> dict[str, float]:
  """The scores worth a line by what they say: {"knn/top1": 0.6, "knn/k10/top1": 0.6} -> {"knn/top1 (k=10)": 0.6}."""
  shown = {}
  for name, value in scores.items():
    if name.endswith("/top1") and not _K.fullmatch("/".join(name.split("/")[-2:])):
      shown[with_k(name, scores)] = value
  return shown


def with_k(name: str, names: Iterable[str]) -> str:
  """The name of a score, with its k where there is one: "knn/top1 (k=10)"; `names` are those of all scores."""
  k = neighbours(names, name) if name.endswith("/top1") else None
  return name if k is None else f"{name} (k={k})"


def neighbours(names: Iterable[str], name: str) -> int | None:
  """The k of "…/top1" of a nearest-neighbour task: the smallest of those that were scored; None: of another task."""
  prefix = name.removesuffix("top1")
  found = [_K.fullmatch(other.removeprefix(prefix)) for other in names if other.startswith(prefix)]
  return min((int(match[1]) for match in found if match), default=None)
