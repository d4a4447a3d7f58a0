"""How scores of all prototypes are taken a chunk of tokens at a time, on every device from its own share of them."""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vit_jax.ops.platform import devices_of

CHUNK_SCORES = 2**25  # scores of a device in a chunk, where no other size is asked for: 128 MiB in float32


def devices_along(logical: str) -> int:
  """Over how many devices the mesh and its rules spread a logical axis; 1 without them."""
  return devices_of(*nn.logical_to_mesh_axes((logical,)))


def shares(x: Float[Array, "U ..."]) -> Float[Array, "x u ..."]:
  """Units as shares of the devices over which they are spread: nothing moves, and the second axis is local."""
  num = math.gcd(x.shape[0], devices_along("batch"))
  return x.reshape(num, x.shape[0] // num, *x.shape[1:])


def on_devices(x: Float[Array, "x ..."]) -> Float[Array, "x ..."]:
  """Says that each share is on its device, whole."""
  return nn.with_logical_constraint(x, ("batch", *[None] * (x.ndim - 1)))


def with_scores(x: Float[Array, "x ... K"]) -> Float[Array, "x ... K"]:
  """Says the same of an array whose last axis are the prototypes, which may be spread, too."""
  return nn.with_logical_constraint(x, ("batch", *[None] * (x.ndim - 2), "prototypes"))


def chunk_size(local: int, scores: int, chunk: int | None, *, least: int = 1) -> int:
  """Units in a chunk, so that all chunks are about the same size.

  Args:
    local: units of a device; of none there is a chunk of none.
    scores: of a unit.
    chunk: units asked for; None: as many as have `CHUNK_SCORES` scores on a device, but at `least` so many.
  """
  if not local:
    return 0
  size = scores // math.gcd(scores, devices_along("prototypes"))
  chunk = min(local, chunk or max(1, least, CHUNK_SCORES // size))
  return -(-local // -(-local // chunk))


def place(index: Int[Array, ""], chunk: int, local: int) -> tuple[Int[Array, ""], Bool[Array, " u"]]:
  """Where chunk number `index` begins, and which of its units are new: the last begins early enough to be whole."""
  start = jnp.minimum(index * chunk, local - chunk)
  return start, start + jnp.arange(chunk) >= index * chunk
