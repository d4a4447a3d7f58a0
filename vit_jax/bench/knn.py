"""`vit-jax bench knn`: the nearest neighbours of the k-NN protocol, beside a matrix product and topk in PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from vit_jax.bench.harness import Part, Row, alternate, repeat
from vit_jax.bench.peer import PEER_PYTHON, find_peer
from vit_jax.evaluation.knn import nearest


@dataclasses.dataclass(frozen=True)
class Case:
  """`queries` features of `width`, each with its `k` nearest of `keys`."""

  keys: int = 50_000
  queries: int = 10_000
  width: int = 384
  k: int = 200


def parts() -> list[Part]:
  """The neighbours of ten thousand images among fifty thousand."""
  return [Part("50k", "200 neighbours of 10,000 images among 50,000", measure)]


def measure(seconds: float, case: Case = Case()) -> Iterator[Row]:
  """One row: the neighbours of ten thousand images among fifty thousand."""
  draw = np.random.default_rng(0)
  keys = draw.standard_normal((case.keys, case.width), np.float32)
  queries = draw.standard_normal((case.queries, case.width), np.float32)
  labels = np.zeros(case.keys, np.int32)

  def ours() -> None:
    jax.block_until_ready(nearest(keys, labels, queries, case.k))

  name = f"{case.k} nearest of {case.keys:,} for {case.queries:,}, width {case.width}"
  theirs = find_peer("torch_ops.py", {"what": "knn", "dtype": "float32", "calls": 1, **dataclasses.asdict(case)})
  if theirs is None:
    timing = repeat(ours, seconds=seconds, units=case.queries)
    yield Row(name, "query, wall", timing, note=f"no PyTorch: set {PEER_PYTHON}")
    return
  with theirs:
    timing, other = alternate(ours, theirs.step, seconds=seconds, units=case.queries)
    yield Row(name, "query, wall", timing, theirs.name, other)
