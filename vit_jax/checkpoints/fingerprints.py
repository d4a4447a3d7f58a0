"""Fingerprints of arrays, with which damage on a disk is told from what was saved.

Orbax notices files that are short or missing, but not a changed bit inside the data of a large array. A fingerprint is

    sum over all elements i of bits_i * (2 K i + 1)   modulo 2^32,  K odd

of the bits of the elements as integers. A sum of integers does not depend on the order in which it is taken: an array
has the same fingerprint on one device and on a thousand, however it is spread, and computing it moves no data between
devices but one number. Every weight is odd: a change of a single element is always seen, any other with a chance of
1 - 2^-32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_STEP = (2 * 0x9E3779B1) % (1 << 32)  # 2 K, K: 2^32 over the golden ratio, which scatters neighbours
_BLOCK = 1 << 16  # elements of a numpy array at a time, that stay in a core's cache

Names = tuple[str, ...]


def fingerprints(arrays: Mapping[Names, Any]) -> dict[str, int]:
  """The fingerprint of every array by its path, joined by slashes; the same on every process.

  Args:
    arrays: numpy or global jax arrays by path, none of typed PRNG keys. Of arrays that are spread over several
      processes all processes must ask together.
  """
  near = {names: array for names, array in arrays.items() if _is_near(array)}
  far = {names: array for names, array in arrays.items() if names not in near}
  found = {names: _of_numpy(np.asarray(array)) for names, array in near.items()}
  if far:
    numbers = jax.device_get(_of_arrays(list(far.values())))
    found |= {names: int(number) for names, number in zip(far, numbers, strict=True)}
  return {"/".join(names): found[names] for names in arrays}


def _is_near(array: Any) -> bool:
  """Whether an array is in this host's memory, where numpy sees it as it is and nothing has to be compiled."""
  if not isinstance(array, jax.Array):
    return True
  return array.is_fully_addressable and all(device.platform == "cpu" for device in array.devices())


def _of_numpy(array: np.ndarray) -> int:
  size = array.dtype.itemsize
  flat = np.ascontiguousarray(array).reshape(-1).view(f"<u{min(size, 4)}")  # 8 bytes and more: as several elements
  weights = np.arange(min(_BLOCK, flat.size), dtype=np.uint32) * np.uint32(_STEP) + np.uint32(1)
  total = 0
  for start in range(0, flat.size, _BLOCK):
    bits = flat[start : start + _BLOCK].astype(np.uint32, copy=False)
    total += int(np.dot(bits, weights[: bits.size])) + _STEP * start * int(bits.sum(dtype=np.uint32))
  return total % (1 << 32)


@jax.jit
def _of_arrays(arrays: list[jax.Array]) -> jax.Array:
  return jnp.stack([_of_array(array) for array in arrays])  # [arrays]


def _of_array(array: jax.Array) -> jax.Array:
  if array.dtype == jnp.bool_:
    array = array.astype(jnp.uint8)
  unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
  bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)  # 8 bytes: one more axis, of 2
  position, stride = jnp.uint32(0), 1
  for axis in reversed(range(bits.ndim)):
    position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % (1 << 32))
    stride *= bits.shape[axis]
  return jnp.sum(bits * (position * jnp.uint32(_STEP) + jnp.uint32(1)), dtype=jnp.uint32)
