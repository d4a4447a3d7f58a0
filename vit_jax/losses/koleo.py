"""The KoLeo regulariser: spreads features uniformly."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vit_jax.ops.normalize import l2_normalize, upcast


def koleo(features: Float[Array, "B D"], *, topk: int = 1, eps: float = 1e-8) -> Float[Array, ""]:
  """KoLeo differential-entropy regulariser: pushes every feature away from its nearest neighbours.

  Minus the mean log distance of each L2-normalised feature to its `topk` nearest neighbours in the batch
  (Sablayrolles et al. 2019, eq. 3; DINOv2 section 4). The gradient flows through both members of a pair, not through
  the choice. Computed in float32 whatever the input.

  Args:
    features: one group of features; B >= topk + 1.
    topk: number of neighbours.
    eps: added to every component of a difference and inside the logarithm.

  Raises:
    ValueError: for another shape or type, or if the group is too small to have `topk` neighbours.
  """
  words = "koleo takes the features [B, D], floats, of one group"
  chex.assert_rank(features, 2, custom_message=words, exception_type=ValueError)
  chex.assert_type(features, float, custom_message=words, exception_type=ValueError)
  num = features.shape[0]
  if num <= topk:
    raise ValueError(
      f"koleo needs more than topk={topk} features in a group, got {num}: "
      "raise batch_size, loss_group_size or koleo.group_size, or set koleo.loss_weight=0."
    )
  x = l2_normalize(upcast(features), eps=eps)  # [B, D]
  frozen = jax.lax.stop_gradient(x)
  similarity = jnp.einsum("id,jd->ij", frozen, frozen, precision=jax.lax.Precision.HIGHEST)  # [B, B]
  neighbours = _nearest(jnp.where(jnp.eye(num, dtype=bool), -jnp.inf, similarity), topk)  # [B, topk]
  distance = jnp.linalg.norm(x[:, None] - x[neighbours] + eps, axis=-1)  # [B, topk]
  return -jnp.mean(jnp.log(distance + eps))


def _nearest(similarity: Float[Array, "B B"], topk: int) -> Int[Array, "B topk"]:
  """The `topk` largest entries of each row, one after the other.

  Not by `lax.top_k`, which the compiler does not divide: it would collect the matrices of all loss groups on every
  device.
  """
  chosen = []
  for _ in range(topk):
    chosen.append(jnp.argmax(similarity, axis=-1))  # [B]
    taken = jnp.arange(similarity.shape[-1]) == chosen[-1][:, None]  # [B, B]
    similarity = jnp.where(taken, -jnp.inf, similarity)
  return jnp.stack(chosen, axis=-1)
