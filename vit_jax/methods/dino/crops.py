"""Crops and tokens as rows: images leading, crops second, so that an image's crops are never on two devices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vit_jax.ops.images import normalize_images

Batch = dict[str, jax.Array]

_CROPS = ("global_crops", "local_crops", "gram_crops")


@dataclasses.dataclass(frozen=True)
class Normalization:
  """Mean and standard deviation of each channel, of values from 0 to 1."""

  mean: tuple[float, ...]
  std: tuple[float, ...]

  def __call__(self, batch: Batch) -> Batch:
    """The batch with its crops, uint8 until now, normalised once."""
    return batch | {name: normalize_images(batch[name], self.mean, self.std) for name in _CROPS if name in batch}


def flatten_crops(crops: Float[Array, "B C H W 3"]) -> Float[Array, "BC H W 3"]:
  """The crops of all images as rows."""
  return crops.reshape(-1, *crops.shape[2:])


def split_crops(rows: Float[Array, "BC D"], images: int) -> Float[Array, "B C D"]:
  """Rows in the order of `flatten_crops` as images x crops."""
  return rows.reshape(images, -1, rows.shape[-1])


def gather_masked(patches: Float[Array, "R N D"], indices: Int[Array, "groups M"]) -> Float[Array, "groups*M D"]:
  """The masked patches of every loss group; `indices` count within the group, so that groups stay on their device."""
  groups, width = indices.shape[0], patches.shape[-1]
  grouped = patches.reshape(groups, -1, width)  # [groups, 2 g N, D]
  return jnp.take_along_axis(grouped, indices[..., None], axis=1).reshape(-1, width)
