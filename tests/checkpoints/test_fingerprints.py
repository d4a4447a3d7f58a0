"""Fingerprints: the same wherever an array is, another for every other content."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.checkpoints import fingerprints as module
from vit_jax.checkpoints.fingerprints import fingerprints

SHAPE = (8, 70, 160)  # more elements than numpy takes at a time


def sample(kind: str) -> np.ndarray:
  values = np.random.default_rng(0).normal(size=SHAPE) * 50
  return np.asarray(jnp.asarray(values).astype(kind)) if kind == "bfloat16" else values.astype(kind)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool"])
def test_an_array_has_one_fingerprint_on_the_host_and_spread_over_devices(kind: str, monkeypatch):
  array = sample(kind)
  mesh = jax.make_mesh((4, 2), ("a", "b"))
  spread = [jax.device_put(array, NamedSharding(mesh, spec)) for spec in (P(), P("a"), P("b", None, "a"))]
  host = fingerprints({("x",): array})["x"]
  monkeypatch.setattr(module, "_is_near", lambda array: False)  # as on accelerators and on several processes
  far = fingerprints({("x", str(i)): each for i, each in enumerate(spread)})
  assert far == {f"x/{i}": host for i in range(3)}


def test_scalars_and_empty_arrays_have_one():
  near = fingerprints({("s",): np.float32(3), ("e",): np.zeros((0, 4), np.float32)})
  assert near["e"] == 0 and near["s"] == int(np.float32(3).view(np.uint32))


def test_every_single_bit_counts():
  array = sample("float32")
  before = fingerprints({("x",): array})["x"]
  rng = np.random.default_rng(1)
  for _ in range(100):
    changed = array.copy()
    changed.reshape(-1).view(np.uint32)[rng.integers(array.size)] ^= np.uint32(1 << rng.integers(32))
    assert fingerprints({("x",): changed})["x"] != before


@pytest.mark.parametrize("change", ["swapped", "zeroed", "shifted", "reversed"])
def test_misplaced_and_lost_parts_count(change: str):
  array = sample("float32")
  changed = array.copy()
  if change == "swapped":
    changed[[0, 1]] = changed[[1, 0]]
  elif change == "zeroed":
    changed[3] = 0
  elif change == "shifted":
    changed = np.roll(changed, 1)
  else:
    changed = changed[::-1]
  assert fingerprints({("x",): changed}) != fingerprints({("x",): array})
