"""What a trained model is printed next to: the scores that the same protocol gives to features without any learning.

On many image sets raw pixels or colours already classify well; a number of a trained model says something only above
them. (Features of the untrained network are another such baseline; whoever has the model makes them.)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from vit_jax.evaluation.features import FeatureFn

_SIDE = 16  # of the thumbnail
_LEVELS = 6  # of each colour channel in the histogram


@jax.jit
def pixels(images: UInt8[np.ndarray, "B H W C"]) -> dict[str, Array]:
  """The image itself, resized to 16x16 (antialiased), less its mean: {"cls": [B, 256 C]}.

  The mean is subtracted because a baseline should be as strong as it easily gets: cosine similarity of uncentred
  pixels is dominated by brightness. k-NN on 48 px tiles of photographs: 0.78 centred, 0.68 not.
  """
  small = jax.image.resize(
    images.astype(jnp.float32) / 255.0, (images.shape[0], _SIDE, _SIDE, images.shape[-1]), "linear", antialias=True
  )  # [B, 16, 16, C]
  flat = small.reshape(images.shape[0], -1)  # [B, 256 C]
  return {"cls": flat - flat.mean(axis=1, keepdims=True)}


@jax.jit
def histogram(images: UInt8[np.ndarray, "B H W C"]) -> dict[str, Array]:
  """The share of the pixels in each of 6x6x6 colours, of the first three channels: {"cls": [B, 216]}."""
  images = jnp.broadcast_to(images[..., :1], (*images.shape[:-1], 3)) if images.shape[-1] < 3 else images
  level = images.astype(jnp.int32) * _LEVELS // 256  # [B, H, W, C]
  colour = (level[..., 0] * _LEVELS + level[..., 1]) * _LEVELS + level[..., 2]  # [B, H, W]
  count = jax.vmap(functools.partial(jnp.bincount, length=_LEVELS**3))(colour.reshape(images.shape[0], -1))  # [B, 216]
  return {"cls": count / (images.shape[1] * images.shape[2])}


BASELINES: Mapping[str, FeatureFn] = {"pixels": pixels, "histogram": histogram}


def majority(train_labels: Int[np.ndarray, " N"], test_labels: Int[np.ndarray, " M"]) -> float:
  """Accuracy of always answering the most frequent training class: the score of knowing nothing about an image."""
  return float(np.mean(test_labels == np.bincount(train_labels).argmax()))
